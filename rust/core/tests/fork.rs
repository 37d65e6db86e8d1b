//! A forked child, such as a `DataLoader`'s worker, has none of its parent's threads: it must not wait for them.

mod support;

use qlora_core::{Nonfinite, QuantType};
use support::{Random, Way, Weights, levels, quantize, spec};

#[test]
fn forked_child_quantizes_on_threads_of_its_own() {
    let shape = (1, 512, 512);
    let spec = spec(QuantType::Nf4, 64);
    let mut random = Random(1);
    let weights = Weights::F32((0..512 * 512).map(|_| random.normal()).collect());
    let way = Way { level: levels().last().expect("scalar is always there"), threads: 2 };
    let parent = quantize(&weights, shape, &spec, Nonfinite::Raise, way).expect("finite");
    // SAFETY: the child only computes, allocates (which libc's fork allows) and ends without running exit handlers.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: plain system calls; a child that waits for ever is ended by the alarm's signal.
        unsafe {
            libc::alarm(30);
            let same = quantize(&weights, shape, &spec, Nonfinite::Raise, way).is_ok_and(|own| own == parent);
            libc::_exit(i32::from(!same));
        }
    }
    assert!(child > 0);
    let mut status = -1;
    // SAFETY: waits for the child made above and writes its status.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed, or hung until its alarm");
}
