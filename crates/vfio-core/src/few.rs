//! A list that is nearly always of one: the first costs no allocation.

use std::slice;

/// None, one or some, in the order they came.
#[derive(Clone, Debug)]
pub(crate) enum Few<T> {
    One(Option<T>),
    Many(Vec<T>),
}

impl<T> Default for Few<T> {
    fn default() -> Few<T> {
        Few::One(None)
    }
}

impl<T> Few<T> {
    pub(crate) fn push(&mut self, value: T) {
        *self = match std::mem::take(self) {
            Few::One(None) => Few::One(Some(value)),
            Few::One(Some(first)) => Few::Many(vec![first, value]),
            Few::Many(mut all) => {
                all.push(value);
                Few::Many(all)
            }
        };
    }

    /// Takes the first out of which that is true, to be dropped where it may be.
    pub(crate) fn take_first(&mut self, is_it: impl Fn(&T) -> bool) -> Option<T> {
        match self {
            Few::One(one) => one.take_if(|one| is_it(one)),
            Few::Many(all) => {
                let at = all.iter().position(is_it)?;
                Some(all.remove(at))
            }
        }
    }

    pub(crate) fn iter(&self) -> slice::Iter<'_, T> {
        match self {
            Few::One(one) => one.as_slice().iter(),
            Few::Many(all) => all.iter(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_a_vector() {
        let mut few = Few::default();
        let mut all: Vec<u32> = Vec::new();
        for step in [1, 2, 3, 0, 4, 0, 0, 0, 0, 5, 0] {
            match step {
                0 => {
                    let first = all.first().copied();
                    assert_eq!(few.take_first(|one| Some(*one) == first), first);
                    if first.is_some() {
                        all.remove(0);
                    }
                }
                value => {
                    few.push(value);
                    all.push(value);
                }
            }
            assert!(few.take_first(|one| *one == 77).is_none());
            assert!(few.iter().eq(&all), "{few:?} {all:?}");
        }
    }
}
