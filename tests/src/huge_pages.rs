//! Huge pages for tests, taken from the machine and given back.

use std::sync::{Mutex, PoisonError};

const PATH: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// How many tests of this process hold the pages, and what the machine had before.
static HELD: Mutex<(usize, String)> = Mutex::new((0, String::new()));

/// Eight huge pages of 2 MiB for the tests of this process, until the last of these is dropped.
#[derive(Debug)]
pub struct HugePages(());

impl HugePages {
    /// Takes them. `None` if the machine has none to give or does not let us.
    #[must_use]
    pub fn reserve() -> Option<HugePages> {
        const PAGES: u64 = 8;
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        if held.0 == 0 {
            let read = || std::fs::read_to_string(PATH).ok();
            let before = read()?;
            let want = before.trim().parse::<u64>().ok()? + PAGES;
            // What counts is what there is afterwards.
            let _ = std::fs::write(PATH, want.to_string());
            if read()?.trim().parse::<u64>().ok()? < want {
                let _ = std::fs::write(PATH, before);
                return None;
            }
            held.1 = before;
        }
        held.0 += 1;
        Some(HugePages(()))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        held.0 -= 1;
        if held.0 == 0 {
            let _ = std::fs::write(PATH, &held.1);
        }
    }
}
