//! Device numbers that the machine has no use for: ours stand beside its own in `/sys/dev/char`.

/// Char majors that the kernel gives to who does not ask for one beyond the first range
/// (`fs/char_dev.c`, `CHRDEV_MAJOR_DYN_EXT_START` down to `_END`).
const MAJORS: std::ops::RangeInclusive<u32> = 384..=511;

/// Minors of misc devices that do not ask for one (`drivers/char/misc.c`, before Linux 6.2).
const MISC_MINORS: std::ops::RangeInclusive<u32> = 0..=127;

/// What was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Numbers {
    /// Of devices' nodes.
    pub(crate) cdev_major: u32,
    /// Of groups' nodes.
    pub(crate) group_major: u32,
    /// Of `/dev/iommu`.
    pub(crate) iommu_minor: u32,
}

impl Numbers {
    /// The highest ones free, as the kernel chooses. A machine that has none left gets the highest:
    /// only its own names are then ambiguous.
    pub(crate) fn free() -> Numbers {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Numbers::among(&read("/proc/devices"), &read("/proc/misc"))
    }

    fn among(devices: &str, misc: &str) -> Numbers {
        let chars = devices.split("Block devices:").next().unwrap_or_default();
        let majors = taken(chars);
        let mut free = MAJORS.rev().filter(|major| !majors.contains(major));
        let minors = taken(misc);
        Numbers {
            cdev_major: free.next().unwrap_or(*MAJORS.end()),
            group_major: free.next().unwrap_or(*MAJORS.end() - 1),
            iommu_minor: MISC_MINORS
                .rev()
                .find(|minor| !minors.contains(minor))
                .unwrap_or(*MISC_MINORS.end()),
        }
    }
}

/// The numbers at the beginnings of lines.
fn taken(text: &str) -> Vec<u32> {
    let first = |line: &str| line.split_whitespace().next()?.parse().ok();
    text.lines().filter_map(first).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_that_are_free() {
        let plain = Numbers {
            cdev_major: 511,
            group_major: 510,
            iommu_minor: 127,
        };
        assert_eq!(Numbers::among("", ""), plain);
        let devices = "Character devices:\n  1 mem\n510 vfio\n\nBlock devices:\n511 loop\n";
        let misc = "127 iommu\n196 vfio\n126 fuse\n";
        assert_eq!(
            Numbers::among(devices, misc),
            Numbers {
                cdev_major: 511,
                group_major: 509,
                iommu_minor: 125,
            }
        );
        let all: String = (0..=511).map(|major| format!("{major} x\n")).collect();
        assert_eq!(Numbers::among(&all, &all), plain, "there are none left");
    }
}
