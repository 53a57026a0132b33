//! Lines on their way to a terminal that may take none: whoever has something to say never waits for it.

use std::collections::VecDeque;

use rustix::io::Errno;

/// What waits for the terminal, in bytes. At 115,200 baud it is shown in 23 s.
const MAX_WAITING: usize = 256 * 1024;

/// Lines that wait for the console. When there are too many, the oldest give way, and their number is shown instead.
#[derive(Debug, Default)]
pub struct Lines {
    waiting: VecDeque<String>,
    /// Their length together.
    bytes: usize,
    dropped: usize,
    /// The line that is being shown, and how much of it has been.
    begun: String,
    shown: usize,
}

impl Lines {
    /// Adds a line, its break included.
    pub fn push(&mut self, line: String) {
        self.bytes += line.len();
        self.waiting.push_back(line);
        while self.bytes > MAX_WAITING
            && let Some(oldest) = self.waiting.pop_front()
        {
            self.bytes -= oldest.len();
            self.dropped += 1;
        }
    }

    fn next(&mut self) -> Option<String> {
        match std::mem::take(&mut self.dropped) {
            0 => {
                let line = self.waiting.pop_front()?;
                self.bytes -= line.len();
                Some(line)
            }
            n => Some(format!("gaia: {n} lines are missing here: the console did not take them\n")),
        }
    }

    /// Writes until nothing is left, which it returns as `false`, or the writer takes no more for now.
    pub fn write(&mut self, mut writer: impl FnMut(&[u8]) -> Result<usize, Errno>) -> bool {
        loop {
            if self.shown >= self.begun.len() {
                let Some(line) = self.next() else { return false };
                (self.begun, self.shown) = (line, 0);
            }
            match writer(&self.begun.as_bytes()[self.shown..]) {
                Ok(0) | Err(Errno::AGAIN) => return true,
                Ok(n) => self.shown += n,
                Err(Errno::INTR) => {}
                Err(_) => {
                    // The console is gone, and with it whoever would have read this.
                    *self = Self::default();
                    return false;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A console that takes `room` bytes more.
    fn shown(queue: &mut Lines, mut room: usize) -> (String, bool) {
        let mut all = Vec::new();
        let left = queue.write(|bytes| {
            let n = bytes.len().min(room);
            room -= n;
            all.extend_from_slice(&bytes[..n]);
            if n == 0 { Err(Errno::AGAIN) } else { Ok(n) }
        });
        (String::from_utf8(all).unwrap(), left)
    }

    #[test]
    fn what_the_console_does_not_take_waits_in_order() {
        let mut queue = Lines::default();
        queue.push("one\n".into());
        queue.push("two\n".into());
        assert_eq!(shown(&mut queue, 2), ("on".into(), true));
        queue.push("three\n".into());
        assert_eq!(shown(&mut queue, 100), ("e\ntwo\nthree\n".into(), false));
        assert_eq!(queue.bytes, 0);
    }

    #[test]
    fn the_oldest_lines_give_way_and_are_counted_but_none_is_cut_off() {
        let mut queue = Lines::default();
        queue.push("begun\n".into());
        assert_eq!(shown(&mut queue, 3), ("beg".into(), true));
        let line = |n: usize| format!("{n:>1023}\n");
        for n in 0..300 {
            queue.push(line(n));
            assert!(queue.bytes <= MAX_WAITING);
        }
        let (text, left) = shown(&mut queue, 1 << 20);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!((lines[0], left), ("un", false));
        assert!(lines[1].contains("44 lines are missing here"), "{}", lines[1]);
        assert_eq!((lines.len(), lines[2].trim()), (2 + 256, "44"));
    }

    #[test]
    fn a_console_that_is_gone_ends_the_waiting() {
        let mut queue = Lines::default();
        queue.push("one\n".into());
        assert!(!queue.write(|_| Err(Errno::IO)));
        assert_eq!((queue.waiting.len(), queue.bytes), (0, 0));
    }
}
