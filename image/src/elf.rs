//! Whether a file can run on a machine without a dynamic linker: just enough of ELF to say so.
//!
//! Bytes are foreign here: nothing panics on them, and what cannot be understood is refused.

const INTERP: u32 = 3;
const DYNAMIC: u32 = 2;
const NEEDED: u64 = 1;
const X86_64: u16 = 62;

/// Whether these bytes claim to be ELF at all.
#[must_use]
pub fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// Refuses what is not a static x86-64 executable (static-pie is one), with the reason.
///
/// # Errors
/// The reason, as the end of a sentence about the file.
pub fn static_x86_64(bytes: &[u8]) -> Result<(), &'static str> {
    const CUT: Result<(), &str> = Err("is cut off: its headers point beyond its end");
    if !is_elf(bytes) {
        return Err("is not an ELF file");
    }
    let (Some(2), Some(1)) = (bytes.get(4), bytes.get(5)) else {
        return Err("is not a 64-bit little-endian ELF file");
    };
    let (Some(kind), Some(machine)) = (u16_at(bytes, 16), u16_at(bytes, 18)) else { return CUT };
    if machine != X86_64 {
        return Err("is not for x86-64");
    }
    if kind != 2 && kind != 3 {
        return Err("is not an executable (an object file, a core dump?)");
    }
    let (Some(table), Some(entry_len), Some(count)) = (u64_at(bytes, 32), u16_at(bytes, 54), u16_at(bytes, 56)) else {
        return CUT;
    };
    if count == 0 {
        return Err("has no program headers, so there is nothing to load");
    }
    for index in 0..u64::from(count) {
        let Some(at) = index.checked_mul(u64::from(entry_len)).and_then(|offset| offset.checked_add(table)) else {
            return CUT;
        };
        let (Some(segment), Some(offset), Some(len)) =
            (u32_at(bytes, at), u64_at(bytes, at.saturating_add(8)), u64_at(bytes, at.saturating_add(32)))
        else {
            return CUT;
        };
        match segment {
            INTERP => return Err("asks for a dynamic linker (PT_INTERP)"),
            DYNAMIC => {
                let Some(dynamic) = range(bytes, offset, len) else { return CUT };
                if dynamic.chunks_exact(16).any(|tag| u64_at(tag, 0) == Some(NEEDED)) {
                    return Err("needs shared libraries (DT_NEEDED)");
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn range(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    bytes.get(start..end)
}

fn u16_at(bytes: &[u8], at: u64) -> Option<u16> {
    range(bytes, at, 2)?.try_into().ok().map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: u64) -> Option<u32> {
    range(bytes, at, 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: u64) -> Option<u64> {
    range(bytes, at, 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// The smallest static executable the check accepts: a header and one `PT_LOAD`.
#[cfg(test)]
pub(crate) fn tiny_static() -> Vec<u8> {
    with_segment(1, &[])
}

#[cfg(test)]
fn with_segment(segment: u32, content: &[u8]) -> Vec<u8> {
    let mut elf = vec![0_u8; 64 + 56];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[16] = 3;
    elf[18] = 62;
    elf[32] = 64;
    elf[54] = 56;
    elf[56] = 1;
    elf[64..68].copy_from_slice(&segment.to_le_bytes());
    elf[72] = 120;
    elf[96..104].copy_from_slice(&(content.len() as u64).to_le_bytes());
    elf.extend_from_slice(content);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn static_is_accepted() {
        assert_eq!(static_x86_64(&tiny_static()), Ok(()));
        let mut flags = [0_u8; 32];
        flags[0] = 30; // DT_FLAGS, as static-pie has
        assert_eq!(static_x86_64(&with_segment(DYNAMIC, &flags)), Ok(()));
    }

    #[test]
    fn this_very_test_is_static() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(static_x86_64(&own).is_ok(), cfg!(target_feature = "crt-static"));
    }

    #[test]
    fn dynamic_is_refused() {
        assert_eq!(static_x86_64(&with_segment(INTERP, b"/lib/ld.so\0")), Err("asks for a dynamic linker (PT_INTERP)"));
        let mut needed = [0_u8; 32];
        needed[16] = 1;
        assert_eq!(static_x86_64(&with_segment(DYNAMIC, &needed)), Err("needs shared libraries (DT_NEEDED)"));
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(static_x86_64(b"#!/bin/sh\n"), Err("is not an ELF file"));
        let mut arm = tiny_static();
        arm[18] = 183;
        assert_eq!(static_x86_64(&arm), Err("is not for x86-64"));
        let mut object = tiny_static();
        object[16] = 1;
        assert_eq!(static_x86_64(&object), Err("is not an executable (an object file, a core dump?)"));
        assert!(static_x86_64(&tiny_static()[..100]).is_err());
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), elf in any::<bool>()) {
            if elf {
                for (byte, magic) in bytes.iter_mut().zip(tiny_static().into_iter().take(20)) {
                    *byte = magic;
                }
            }
            let _ = static_x86_64(&bytes);
        }
    }
}
