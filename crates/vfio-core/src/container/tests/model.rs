//! Random sequences of MAP and UNMAP against a model that keeps a list, for both versions.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Pages of client memory; the byte in each is its number.
const MEMORY: u64 = 16;
/// IOVAs are below this many pages.
const SPACE: u64 = 24;
/// Mappings that there may be.
const ENTRIES: usize = 6;

#[derive(Clone, Debug)]
enum Op {
    Map {
        at: u64,
        from: u64,
        pages: u64,
        write: bool,
    },
    Unmap {
        at: u64,
        pages: u64,
    },
    All,
    Write {
        page: u64,
    },
    Dirty,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (0..SPACE, 0..MEMORY, 0..5u64, any::<bool>())
            .prop_map(|(at, from, pages, write)| Op::Map { at, from, pages, write }),
        4 => (0..SPACE, 0..8u64).prop_map(|(at, pages)| Op::Unmap { at, pages }),
        1 => Just(Op::All),
        3 => (0..SPACE).prop_map(|page| Op::Write { page }),
        1 => Just(Op::Dirty),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Mapped {
    pages: u64,
    from: u64,
    writable: bool,
}

#[derive(Debug, Default)]
struct Model {
    v2: bool,
    /// By first page.
    areas: BTreeMap<u64, Mapped>,
    dirty: u64,
}

impl Model {
    fn at(&self, page: u64) -> Option<(u64, Mapped)> {
        let (&start, &area) = self.areas.range(..=page).next_back()?;
        (page < start + area.pages).then_some((start, area))
    }

    fn map(&mut self, at: u64, area: Mapped) -> Result<u32> {
        if area.pages == 0 {
            return Err(Errno::INVAL);
        }
        if (at..at + area.pages).any(|page| self.at(page).is_some()) {
            return Err(Errno::EXIST);
        }
        if self.areas.len() == ENTRIES {
            return Err(Errno::NOSPC);
        }
        self.areas.insert(at, area);
        Ok(0)
    }

    fn unmap(&mut self, at: u64, pages: u64) -> Result<u64> {
        if pages == 0 {
            return Err(Errno::INVAL);
        }
        let end = at + pages;
        let touched: Vec<(u64, Mapped)> = self
            .areas
            .iter()
            .map(|(start, area)| (*start, *area))
            .filter(|(start, area)| *start < end && start + area.pages > at)
            .collect();
        let cut = |(start, area): &(u64, Mapped)| *start < at || start + area.pages > end;
        if self.v2 && touched.iter().any(cut) {
            return Err(Errno::INVAL);
        }
        if touched.first().is_some_and(|(start, _)| *start < at) {
            return Ok(0);
        }
        for (start, area) in &touched {
            self.areas.remove(start);
            (*start..start + area.pages).for_each(|page| self.dirty &= !(1 << page));
        }
        Ok(touched.iter().map(|(_, area)| area.pages).sum())
    }

    /// The mapped pages, as bits.
    fn mapped(&self) -> u64 {
        let pages = |(start, area): (&u64, &Mapped)| *start..start + area.pages;
        self.areas
            .iter()
            .flat_map(pages)
            .map(|page| 1 << page)
            .sum()
    }
}

fn run(version: u32, ops: &[Op]) -> Result<(), TestCaseError> {
    let c = Client {
        container: Container::with_entry_limit(ENTRIES as u32),
        ..Client::new()
    };
    let attached = c.join_emulated();
    c.set_iommu(version).unwrap();
    let device = Opened::new(&attached, None);
    let mut model = Model {
        v2: version == 3,
        ..Model::default()
    };
    if model.v2 {
        c.dirty(DirtyFlags::START).unwrap();
    }
    let mut memory = Pages::new(MEMORY as usize + 8);
    let va = memory.addr();
    let numbers = memory.bytes().chunks_mut(4096).zip(0..);
    numbers.for_each(|(page, n)| page.fill(n));
    for op in ops {
        match *op {
            Op::Map {
                at,
                from,
                pages,
                write,
            } => {
                let flags = if write { RW } else { R };
                let got = c.map(flags, va + from * PAGE, at * PAGE, pages * PAGE);
                let area = Mapped {
                    pages,
                    from,
                    writable: write,
                };
                prop_assert_eq!(got, model.map(at, area), "{:?}", op);
            }
            Op::Unmap { at, pages } => {
                let got = c.unmap(at * PAGE, pages * PAGE);
                let want = model.unmap(at, pages);
                prop_assert_eq!(got.map(|bytes| bytes / PAGE), want, "{:?}", op);
            }
            Op::All => {
                let got = c.unmap_with(UnmapFlags::ALL, 0, 0).unwrap() / PAGE;
                prop_assert_eq!(got, u64::from(model.mapped().count_ones()));
                model.areas.clear();
                model.dirty = 0;
            }
            Op::Write { page } => {
                let want = match model.at(page) {
                    None => Err(Errno::INVAL),
                    Some((_, area)) if !area.writable => Err(Errno::PERM),
                    Some((start, area)) => {
                        model.dirty |= 1 << page;
                        // What is there already, so that the pages keep their numbers.
                        Ok((area.from + page - start) as u8)
                    }
                };
                let got = device.write(page * PAGE + 7, &[want.unwrap_or(0)]);
                prop_assert_eq!(got, want.map(|_| ()), "{:?}", op);
            }
            Op::Dirty => {
                // What cuts no mapping: all of it. Bits of holes stay as they were.
                let mut words = [u64::MAX];
                let got = c.get_dirty(0, 64 * PAGE, &mut words);
                if !model.v2 {
                    prop_assert_eq!(got, Err(Errno::ACCESS));
                    continue;
                }
                prop_assert_eq!(got, Ok(0));
                prop_assert_eq!(words[0], model.dirty | !model.mapped());
                model.dirty = 0;
            }
        }
    }
    for page in 0..SPACE + 8 {
        let want = match model.at(page) {
            Some((start, area)) => Ok((area.from + page - start) as u8),
            None => Err(Errno::INVAL),
        };
        prop_assert_eq!(device.read(page * PAGE), want);
        prop_assert_eq!(device.read(page * PAGE + 4095), want);
    }
    let left = ENTRIES - model.areas.len();
    let (_, rest) = c.info(72).unwrap();
    let avail = vfio_uapi::caps::DmaAvailCap::read_from_prefix(&rest[32..]);
    prop_assert_eq!(avail.unwrap().0.avail as usize, left);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn v1_like_a_list(ops in prop::collection::vec(op(), 1..60)) {
        run(1, &ops)?;
    }

    #[test]
    fn v2_like_a_list(ops in prop::collection::vec(op(), 1..60)) {
        run(3, &ops)?;
    }
}
