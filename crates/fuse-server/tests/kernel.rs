//! The crate against the running kernel. Needs `/dev/fuse` and the right to mount.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::Tree;

#[test]
fn open_read_write_and_end() {
    let Some(tree) = Tree::mount() else { return };
    let file = File::options()
        .read(true)
        .write(true)
        .open(tree.file())
        .expect("open");
    file.write_all_at(b"abcd", 2).expect("write");
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 2).expect("read");
    assert_eq!(&bytes, b"abcd");
    drop(file);
    tree.end();
}
