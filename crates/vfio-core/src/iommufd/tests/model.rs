//! Random sequences of MAP, UNMAP and COPY against a model that keeps a list.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Pages of client memory; the byte in each is its number.
const MEMORY: u64 = 16;
/// IOVAs of fixed mappings are below this many pages.
const SPACE: u64 = 24;

#[derive(Clone, Debug)]
enum Op {
    Map {
        ioas: usize,
        at: Option<u64>,
        from: u64,
        pages: u64,
        write: bool,
    },
    Copy {
        from: (usize, u64),
        to: (usize, Option<u64>),
        pages: u64,
        write: bool,
    },
    Unmap {
        ioas: usize,
        at: u64,
        pages: u64,
    },
    Allow {
        ioas: usize,
        ranges: Vec<(u64, u64)>,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let place = || prop_oneof![3 => (0..SPACE).prop_map(Some), 1 => Just(None)];
    prop_oneof![
        4 => (0..2usize, place(), 0..MEMORY, 0..5u64, any::<bool>()).prop_map(
            |(ioas, at, from, pages, write)| Op::Map { ioas, at, from, pages, write }
        ),
        3 => ((0..2usize, 0..SPACE), (0..2usize, place()), 0..6u64, any::<bool>()).prop_map(
            |(from, to, pages, write)| Op::Copy { from, to, pages, write }
        ),
        3 => (0..2usize, 0..SPACE, 0..8u64)
            .prop_map(|(ioas, at, pages)| Op::Unmap { ioas, at, pages }),
        1 => (0..2usize, prop::collection::vec((0..SPACE, 0..6u64), 0..3))
            .prop_map(|(ioas, ranges)| Op::Allow { ioas, ranges }),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Mapped {
    pages: u64,
    /// Page of client memory.
    from: u64,
    writable: bool,
}

#[derive(Debug, Default)]
struct Space {
    /// By first page.
    areas: BTreeMap<u64, Mapped>,
    allowed: Vec<(u64, u64)>,
}

impl Space {
    fn at(&self, page: u64) -> Option<(u64, Mapped)> {
        let (&start, &area) = self.areas.range(..=page).next_back()?;
        (page < start + area.pages).then_some((start, area))
    }

    fn is_free(&self, at: u64, pages: u64) -> bool {
        (at..at + pages).all(|page| self.at(page).is_none())
    }

    /// `va_page` is the number of the page in the client's address space.
    fn place(&self, at: Option<u64>, pages: u64, va_page: u64) -> Result<u64> {
        if pages == 0 {
            return Err(Errno::INVAL);
        }
        if let Some(at) = at {
            return if self.is_free(at, pages) {
                Ok(at)
            } else {
                Err(Errno::EXIST)
            };
        }
        let align = pages
            .next_power_of_two()
            .min(1 << va_page.trailing_zeros())
            .min(512);
        let allowed = |page: u64| {
            self.allowed.is_empty() || self.allowed.iter().any(|&(a, b)| (a..=b).contains(&page))
        };
        (1..4096)
            .find(|&at| at % align == 0 && self.is_free(at, pages) && (at..at + pages).all(allowed))
            .ok_or(Errno::NOSPC)
    }

    fn put(&mut self, mut at: u64, parts: &[Mapped]) {
        for part in parts {
            self.areas.insert(at, *part);
            at += part.pages;
        }
    }

    fn parts(&self, at: u64, pages: u64) -> Result<Vec<Mapped>> {
        if pages == 0 {
            return Err(Errno::INVAL);
        }
        let mut parts = Vec::new();
        let mut page = at;
        while page < at + pages {
            let (start, area) = self.at(page).ok_or(Errno::NOENT)?;
            let end = (start + area.pages).min(at + pages);
            parts.push(Mapped {
                pages: end - page,
                from: area.from + (page - start),
                writable: area.writable,
            });
            page = end;
        }
        Ok(parts)
    }

    fn unmap(&mut self, at: u64, pages: u64) -> Result<u64> {
        if pages == 0 {
            return Err(Errno::INVAL);
        }
        let mut gone = 0;
        for page in at..at + pages {
            if let Some((start, area)) = self.at(page) {
                if start < at || start + area.pages > at + pages {
                    return Err(Errno::NOENT);
                }
                self.areas.remove(&start);
                gone += area.pages;
            }
        }
        if gone == 0 {
            Err(Errno::NOENT)
        } else {
            Ok(gone)
        }
    }
}

fn step(c: &Client, ids: &[u32], spaces: &mut [Space; 2], va: u64, op: &Op) {
    let prot = |write: bool| if write { RW } else { R };
    let fixed = |at: Option<u64>| {
        if at.is_some() {
            FIXED
        } else {
            MapFlags::empty()
        }
    };
    match *op {
        Op::Map {
            ioas,
            at,
            from,
            pages,
            write,
        } => {
            let part = Mapped {
                pages,
                from,
                writable: write,
            };
            let want = spaces[ioas].place(at, pages, va / PAGE + from);
            let flags = prot(write) | fixed(at);
            let iova = at.unwrap_or(0) * PAGE;
            let got = c.map(ids[ioas], flags, va + from * PAGE, pages * PAGE, iova);
            assert_eq!(got.map(|iova| iova / PAGE), want, "{op:?}");
            if let Ok(at) = want {
                spaces[ioas].put(at, &[part]);
            }
        }
        Op::Copy {
            from,
            to,
            pages,
            write,
        } => {
            let want = spaces[from.0].parts(from.1, pages).and_then(|parts| {
                let at = spaces[to.0].place(to.1, pages, va / PAGE + parts[0].from)?;
                if write && parts.iter().any(|part| !part.writable) {
                    return Err(Errno::PERM);
                }
                spaces[to.0].put(at, &parts);
                Ok(at)
            });
            let got = c.copy(
                (ids[to.0], to.1.unwrap_or(0) * PAGE),
                (ids[from.0], from.1 * PAGE),
                pages * PAGE,
                prot(write) | fixed(to.1),
            );
            assert_eq!(got.map(|iova| iova / PAGE), want, "{op:?}");
        }
        Op::Unmap { ioas, at, pages } => {
            let want = spaces[ioas].unmap(at, pages);
            let got = c.unmap(ids[ioas], at * PAGE, pages * PAGE);
            assert_eq!(got.map(|len| len / PAGE), want, "{op:?}");
        }
        Op::Allow { ioas, ref ranges } => {
            let mut want = Ok(0);
            let mut pages: Vec<(u64, u64)> = Vec::new();
            for &(at, more) in ranges {
                let range = (at, at + more);
                if pages.iter().any(|&(a, b)| a <= range.1 && range.0 <= b) {
                    want = Err(Errno::INVAL);
                    break;
                }
                pages.push(range);
            }
            let ranges: Vec<_> = ranges
                .iter()
                .map(|&(at, more)| (at * PAGE, (at + more + 1) * PAGE - 1))
                .collect();
            assert_eq!(c.allow(ids[ioas], &ranges), want, "{op:?}");
            if want.is_ok() {
                spaces[ioas].allowed = pages;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn like_a_list(ops in prop::collection::vec(op(), 1..60)) {
        let c = Client::new();
        let mut memory = Pages::new(MEMORY as usize + 8);
        let va = memory.addr();
        memory.bytes().chunks_mut(4096).zip(0..).for_each(|(page, n)| page.fill(n));
        let ids = [c.ioas(), c.ioas()];
        let mut spaces = [Space::default(), Space::default()];
        for op in &ops {
            step(&c, &ids, &mut spaces, va, op);
        }
        for (id, space) in ids.iter().zip(&spaces) {
            let port = c.port(*id);
            for page in 0..SPACE + 8 {
                let want = match space.at(page) {
                    Some((start, area)) => Ok((area.from + page - start) as u8),
                    None => Err(Errno::NOENT),
                };
                prop_assert_eq!(byte(&port, page * PAGE), want);
                prop_assert_eq!(byte(&port, page * PAGE + 4095), want);
            }
        }
    }
}
