//! The allocator: musl's, behind lists of blocks that a worker keeps for its next request.
//!
//! musl gives memory back to the kernel as soon as it can: a task's few KiB were mapped, touched and unmapped again for each
//! request, which took a third of it (docs/performance.md). Here a block that is freed goes into the list of its size, for
//! its thread alone, and the next of that size comes out of it: no lock, no system call, no page that is new.
//!
//! Only who says so keeps any, and only up to so many bytes for a thread; everything else goes to musl at once. So what a
//! burst of connections took does not stay. In exchange musl does not see the frees of what is kept, and its checks of them
//! neither: a block that is freed twice must be kept out by Rust.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The largest block that has a list, in bytes.
const LARGEST: usize = 32 * 1024;
/// The alignments that have lists: any object's, and that of tokio's tasks.
const ALIGNMENTS: [usize; 2] = [16, 128];
/// Sizes that have lists: 16, 32, 48, 64, and from there on four for each doubling.
const SIZES: usize = 4 + 4 * 9;

const _: () = assert!(size(SIZES - 1) == LARGEST);

/// Bytes that each thread may keep from now on. 0 until someone says otherwise.
static MOST: AtomicUsize = AtomicUsize::new(0);

/// From now on every thread of this process keeps up to so many bytes.
pub fn keep(bytes: usize) {
    MOST.store(bytes, Relaxed);
}

/// The number of the smallest size that holds so many bytes.
const fn class(bytes: usize) -> usize {
    if bytes <= 64 {
        return if bytes == 0 { 0 } else { (bytes - 1) / 16 };
    }
    // 2^doubling < bytes <= 2^(doubling + 1)
    let doubling = usize::BITS - 1 - (bytes - 1).leading_zeros();
    let quarter = ((bytes - 1) >> (doubling - 2)) & 3;
    4 + (doubling as usize - 6) * 4 + quarter
}

/// The bytes of a block of that size.
const fn size(class: usize) -> usize {
    if class < 4 {
        return (class + 1) * 16;
    }
    let (doubling, quarter) = ((class - 4) / 4 + 6, (class - 4) % 4);
    (1 << doubling) + ((quarter + 1) << (doubling - 2))
}

/// What one thread keeps: of each alignment and size a list of blocks, each of which begins with the address of the next.
struct Lists {
    first: [[*mut u8; SIZES]; ALIGNMENTS.len()],
    bytes: usize,
}

thread_local! {
    // Nothing is to be dropped, so there is no moment at which it could not be had.
    static LISTS: UnsafeCell<Lists> =
        const { UnsafeCell::new(Lists { first: [[ptr::null_mut(); SIZES]; ALIGNMENTS.len()], bytes: 0 }) };
}

/// Where a block of this layout belongs: its alignment's and size's numbers, and the layout that all there have. `None` if
/// it is none of those that are kept.
fn place(layout: Layout) -> Option<(usize, usize, Layout)> {
    let alignment = ALIGNMENTS.iter().position(|most| layout.align() <= *most)?;
    if layout.size() > LARGEST {
        return None;
    }
    let class = class(layout.size());
    let whole = Layout::from_size_align(size(class), ALIGNMENTS[alignment]).ok()?;
    Some((alignment, class, whole))
}

/// Where a kept block has the address of the next: at its beginning, which is aligned to 16 bytes.
fn next(block: *mut u8) -> *mut *mut u8 {
    block.cast()
}

/// The allocator.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kept;

// SAFETY: a block is in exactly one place: with whoever allocated it, in one list of one thread, or with musl. It gets into a
// list only when it is freed, and out of it only as an allocation. All blocks of a list were allocated with the layout of
// that list, which `place` finds from the caller's layout alone, the same for both calls; it is at least as large and as
// aligned. Nothing here unwinds or allocates in turn.
unsafe impl GlobalAlloc for Kept {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some((alignment, class, whole)) = place(layout) else {
            // SAFETY: the caller's own promise.
            return unsafe { System.alloc(layout) };
        };
        let kept = LISTS.try_with(|lists| {
            // SAFETY: of this thread alone, and not lent out: nothing that is called in here allocates.
            let lists = unsafe { &mut *lists.get() };
            let first = lists.first[alignment][class];
            if !first.is_null() {
                // SAFETY: a block in a list begins with the address of the next, and has 16 bytes at least.
                lists.first[alignment][class] = unsafe { next(first).read() };
                lists.bytes -= whole.size();
            }
            first
        });
        match kept {
            Ok(block) if !block.is_null() => block,
            // SAFETY: not empty: the smallest size is 16 bytes.
            _ => unsafe { System.alloc(whole) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some((alignment, class, whole)) = place(layout) else {
            // SAFETY: allocated so by `alloc`.
            return unsafe { System.dealloc(block, layout) };
        };
        let kept = LISTS.try_with(|lists| {
            // SAFETY: as in `alloc`.
            let lists = unsafe { &mut *lists.get() };
            let fits = lists.bytes + whole.size() <= MOST.load(Relaxed);
            if fits {
                // SAFETY: the block is nobody's any more, has 16 bytes at least, and is aligned for an address.
                unsafe { next(block).write(lists.first[alignment][class]) };
                lists.first[alignment][class] = block;
                lists.bytes += whole.size();
            }
            fits
        });
        if !kept.unwrap_or(false) {
            // SAFETY: allocated so by `alloc`.
            unsafe { System.dealloc(block, whole) };
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if place(layout).is_none() {
            // Fresh pages are zero already.
            // SAFETY: the caller's own promise.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // SAFETY: the caller's own promise.
        let block = unsafe { self.alloc(layout) };
        if !block.is_null() {
            // SAFETY: a block of at least that size which nobody else has.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: the caller's own promise: not zero, and with this alignment no more than `isize::MAX`.
        let wanted = unsafe { Layout::from_size_align_unchecked(bytes, layout.align()) };
        match (place(layout), place(wanted)) {
            // The pages are moved, not copied.
            // SAFETY: both of them are musl's.
            (None, None) => return unsafe { System.realloc(block, layout, bytes) },
            (Some((_, before, _)), Some((_, after, _))) if before == after => return block,
            _ => {}
        }
        // SAFETY: as above.
        let moved = unsafe { self.alloc(wanted) };
        if !moved.is_null() {
            // SAFETY: two blocks, both at least so long.
            unsafe { ptr::copy_nonoverlapping(block, moved, layout.size().min(bytes)) };
            // SAFETY: the caller gave it up.
            unsafe { self.dealloc(block, layout) };
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_size_is_held_by_its_class_and_by_no_smaller_one() {
        for bytes in 1..=LARGEST {
            let class = class(bytes);
            assert!(size(class) >= bytes, "{bytes}");
            assert!(class == 0 || size(class - 1) < bytes, "{bytes}");
            assert!(bytes <= 64 || size(class) <= bytes + bytes / 4, "{bytes} in {}", size(class));
        }
    }

    fn kept() -> usize {
        // SAFETY: of this thread, and not lent out.
        LISTS.with(|lists| unsafe { (*lists.get()).bytes })
    }

    /// What the tests of this process set is for all of them.
    const SOME: usize = 1 << 16;

    #[derive(Debug, Clone)]
    enum Step {
        Allocate { bytes: usize, align: usize, zeroed: bool },
        Free(usize),
        Grow(usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let bytes = prop_oneof![1_usize..300, 1..LARGEST + 2000, Just(LARGEST), Just(LARGEST + 1)];
        prop_oneof![
            (bytes.clone(), 0_u32..9, any::<bool>()).prop_map(|(bytes, align, zeroed)| Step::Allocate {
                bytes,
                align: 1 << align,
                zeroed
            }),
            any::<usize>().prop_map(Step::Free),
            (any::<usize>(), bytes).prop_map(|(at, bytes)| Step::Grow(at, bytes)),
        ]
    }

    /// A block and what is written all over it.
    struct Block(*mut u8, Layout, u8);

    impl Block {
        fn fill(&self) {
            // SAFETY: it is this test's own, and so long.
            unsafe { self.0.write_bytes(self.2, self.1.size()) };
        }

        fn is_whole(&self, bytes: usize) -> bool {
            // SAFETY: as above, and it was filled.
            unsafe { std::slice::from_raw_parts(self.0, bytes) }.iter().all(|byte| *byte == self.2)
        }
    }

    proptest! {
        /// Would miss: two owners of one block, one that is too short or not aligned, zeroes that are none, more kept than may be.
        #[test]
        fn every_block_is_its_owners_alone(steps in proptest::collection::vec(step(), 1..200)) {
            keep(SOME);
            let mut blocks: Vec<Block> = Vec::new();
            for (number, step) in steps.into_iter().enumerate() {
                let mark = u8::try_from(number % 251).unwrap() + 1;
                match step {
                    Step::Allocate { bytes, align, zeroed } => {
                        let layout = Layout::from_size_align(bytes, align).unwrap();
                        // SAFETY: not empty.
                        let at = unsafe { if zeroed { Kept.alloc_zeroed(layout) } else { Kept.alloc(layout) } };
                        prop_assert!(!at.is_null() && at.addr().is_multiple_of(align));
                        prop_assert!(!zeroed || Block(at, layout, 0).is_whole(bytes));
                        blocks.push(Block(at, layout, mark));
                    }
                    Step::Free(at) if !blocks.is_empty() => {
                        let block = blocks.swap_remove(at % blocks.len());
                        prop_assert!(block.is_whole(block.1.size()));
                        // SAFETY: allocated above with that layout.
                        unsafe { Kept.dealloc(block.0, block.1) };
                        continue;
                    }
                    Step::Grow(at, bytes) if !blocks.is_empty() => {
                        let Block(before, layout, old) = blocks.swap_remove(at % blocks.len());
                        // SAFETY: allocated above with that layout.
                        let after = unsafe { Kept.realloc(before, layout, bytes) };
                        let moved = Block(after, Layout::from_size_align(bytes, layout.align()).unwrap(), old);
                        prop_assert!(moved.is_whole(bytes.min(layout.size())) && after.addr().is_multiple_of(layout.align()));
                        blocks.push(Block(after, moved.1, mark));
                    }
                    _ => continue,
                }
                blocks.last().unwrap().fill();
                prop_assert!(kept() <= SOME);
            }
            for block in blocks {
                prop_assert!(block.is_whole(block.1.size()));
                // SAFETY: as above.
                unsafe { Kept.dealloc(block.0, block.1) };
            }
        }
    }

    #[test]
    fn what_was_freed_is_what_is_allocated_next() {
        keep(SOME);
        let layout = Layout::from_size_align(3000, 128).unwrap();
        // SAFETY: not empty, and each is freed once.
        unsafe {
            let first = Kept.alloc(layout);
            Kept.dealloc(first, layout);
            let next = Kept.alloc(Layout::from_size_align(3072, 64).unwrap());
            assert_eq!(first, next, "of the same class");
            Kept.dealloc(next, layout);
        }
    }
}
