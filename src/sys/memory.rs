//! What the kernel hears about large buffers.

/// Bytes of a large page.
const LARGE_PAGE: usize = 2 << 20;
/// Bytes of a page; where pages are larger, the kernel refuses what does not begin with one.
const PAGE: usize = 4096;
/// So few pages are not worth a call.
const FEW_PAGES: usize = 16;

/// Asks for large pages for a buffer that is about to be filled, where that pays: with pages of 4 KiB, each of them is
/// a page fault. Best effort: without it the buffer is the same, and slower to fill.
///
/// Only for a buffer so large that the allocator gives it back to the system when it is freed
/// ([`lean_allocator`](super::daemon::lean_allocator)): what is asked for holds for the addresses, not for the buffer.
pub fn use_large_pages(buffer: &mut [u8]) {
    // Whole large pages only. They are the buffer's alone, and nothing of its neighbours.
    let start = buffer.as_ptr().addr().next_multiple_of(LARGE_PAGE);
    let end = (buffer.as_ptr().addr() + buffer.len()) / LARGE_PAGE * LARGE_PAGE;
    if buffer.len() >= 2 * LARGE_PAGE && start < end {
        // SAFETY: the range lies within the buffer, which is borrowed mutably; the call changes no byte of it.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
        }
    }
}

/// Gets the pages of a buffer that is about to be filled from the system, all at once: that takes half the time of a page
/// fault for each. Best effort, as above.
pub fn populate<T>(buffer: &mut [T]) {
    // Whole pages only: the others have neighbours, which are there already.
    let start = buffer.as_ptr().addr().next_multiple_of(PAGE);
    let end = (buffer.as_ptr().addr() + size_of_val(buffer)) / PAGE * PAGE;
    if end.saturating_sub(start) >= FEW_PAGES * PAGE {
        // SAFETY: the range lies within the buffer, which is borrowed mutably; the call changes no byte of it, and reads
        // none.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_POPULATE_WRITE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_of_any_size_is_filled_as_before() {
        for len in [0, 1, 4096, 2 * LARGE_PAGE - 1, 2 * LARGE_PAGE, 5 * LARGE_PAGE + 17] {
            let mut buffer = vec![0; len];
            use_large_pages(&mut buffer);
            populate(&mut buffer);
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at * 31 % 251) as u8);
            assert!(buffer.iter().enumerate().all(|(at, byte)| *byte == (at * 31 % 251) as u8));
        }
    }

    #[test]
    fn a_vector_that_is_filled_in_part_keeps_what_it_has() {
        let mut numbers: Vec<u32> = Vec::with_capacity(FEW_PAGES * PAGE);
        numbers.extend(0..10_000);
        populate(numbers.spare_capacity_mut());
        populate(&mut numbers);
        numbers.extend(10_000..20_000);
        assert!(numbers.into_iter().eq(0..20_000));
    }
}
