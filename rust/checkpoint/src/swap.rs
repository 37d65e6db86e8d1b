//! Two paths that change places in one step, so that there is no moment without either.

use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::CheckpointError;

/// Let two existing paths of one file system change places. `false`, and nothing has happened, where that cannot be done
/// in one step: not every file system can, and kernels before 3.15 do not.
///
/// # Errors
///
/// The system refused for another reason.
pub fn swap(a: &Path, b: &Path) -> Result<bool, CheckpointError> {
    match renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::XDEV | Errno::PERM) => Ok(false),
        Err(error) => Err(CheckpointError::io(a)(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn folders_change_places_with_their_content() {
        let root = tempfile::tempdir().expect("folder");
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        for (path, content) in [(&a, "first"), (&b, "second")] {
            fs::create_dir(path).expect("folder");
            fs::write(path.join("file"), content).expect("written");
        }
        let expected = if swap(&a, &b).expect("both are there") { ["second", "first"] } else { ["first", "second"] };
        let found = [&a, &b].map(|path| fs::read_to_string(path.join("file")).expect("read"));
        assert_eq!(found, expected);
    }

    #[test]
    fn a_path_that_is_not_there_is_an_error_and_leaves_the_other() {
        let root = tempfile::tempdir().expect("folder");
        let a = root.path().join("a");
        fs::create_dir(&a).expect("folder");
        assert!(swap(&a, &root.path().join("b")).is_err());
        assert!(a.is_dir());
    }
}
