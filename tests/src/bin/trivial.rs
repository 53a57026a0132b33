//! The least that can be PID 1: says that it runs, and does nothing. What a kernel takes until its init runs is measured with it.

/// Says so and waits for ever: if it ended, the kernel would panic.
fn main() {
    println!("trivial: running");
    loop {
        std::thread::park();
    }
}
