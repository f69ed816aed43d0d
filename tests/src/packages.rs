//! Where `cargo xtask test` has put QEMU, headers and guest kernels, and where cargo builds the
//! programs. Nothing here fetches or builds.

use std::path::Path;
use std::path::PathBuf;

/// The private prefix.
#[derive(Debug, Clone)]
pub struct Prefix {
    dir: PathBuf,
}

/// Kernels of Debian that guests can boot, of the cloud flavour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's own, 6.1: VFIO with groups; `vfio-dev/vfioN` without `dev`.
    Bookworm,
    /// The backports' newest, 6.12 and up: the same, for Debian builds no cdev support.
    Backports,
}

impl Prefix {
    /// The prefix of this build.
    ///
    /// # Errors
    /// It is not there yet; the message says which command makes it. It is meant for
    /// [`skip`](crate::skip()).
    pub fn find() -> Result<Self, String> {
        let dir = std::env::var_os("VFIOD_PRIVATE_DIR")
            .map(PathBuf::from)
            .or_else(|| target().map(|target| target.join("private")))
            .ok_or("this test was not started from a target directory")?;
        if dir.join("stamp").exists() {
            Ok(Self { dir })
        } else {
            Err(format!(
                "{} has no QEMU and kernels yet: `cargo xtask prepare` fetches them",
                dir.display()
            ))
        }
    }

    /// QEMU 10, x86-64: a script that runs it with its own libraries and firmware.
    pub fn qemu(&self) -> PathBuf {
        self.dir.join("bin/qemu-system-x86_64")
    }

    /// QEMU 11, x86-64, which has `vfio-user-pci`: a script that runs it with its own loader,
    /// libraries and firmware.
    ///
    /// # Errors
    /// It could not be fetched when the rest of the prefix was; meant for [`skip`](crate::skip()).
    pub fn qemu11(&self) -> Result<PathBuf, String> {
        let place = self.dir.join("trixie-backports");
        if place.join("stamp").exists() {
            Ok(place.join("qemu-system-x86_64"))
        } else {
            Err(format!(
                "{} has no QEMU 11: `cargo xtask prepare` fetches it, or says why it cannot",
                self.dir.display()
            ))
        }
    }

    /// A BusyBox without libraries.
    pub fn busybox(&self) -> PathBuf {
        self.root().join("bin/busybox")
    }

    /// Directories for `cc -isystem`, nearest first: kernel headers that know cdev and iommufd.
    pub fn include_dirs(&self) -> [PathBuf; 2] {
        let include = self.root().join("usr/include");
        [include.join("x86_64-linux-gnu"), include]
    }

    /// Where packages of the backports are unpacked, as if it were `/`.
    pub fn root(&self) -> PathBuf {
        self.dir.join("bookworm-backports")
    }

    /// The image of `kernel`, its release, and its modules' directory `lib/modules/RELEASE`.
    ///
    /// # Errors
    /// The prefix is incomplete; the message names what is missing.
    pub fn kernel(&self, kernel: Kernel) -> Result<KernelFiles, String> {
        let dir = self.dir.join("kernels").join(match kernel {
            Kernel::Bookworm => "bookworm",
            Kernel::Backports => "backports",
        });
        let boot = dir.join("boot");
        let image = std::fs::read_dir(&boot)
            .map_err(|error| format!("{}: {error}", boot.display()))?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| file_name(path).starts_with("vmlinuz-"))
            .ok_or_else(|| format!("{} has no vmlinuz", boot.display()))?;
        let release = file_name(&image).trim_start_matches("vmlinuz-").to_owned();
        Ok(KernelFiles {
            modules: dir.join("lib/modules").join(&release),
            image,
            release,
        })
    }
}

/// What a guest boots.
#[derive(Debug, Clone)]
pub struct KernelFiles {
    /// The bzImage.
    pub image: PathBuf,
    /// What `uname -r` prints in the guest.
    pub release: String,
    /// `lib/modules/RELEASE`, with `modules.dep`.
    pub modules: PathBuf,
}

/// A program of ours that cargo has built, e.g. `vfioctl`.
///
/// # Errors
/// It is not there; the message says which command builds it.
pub fn program(name: &str) -> Result<PathBuf, String> {
    let dir = std::env::var_os("VFIOD_BIN_DIR")
        .map(PathBuf::from)
        .or_else(|| target().map(|target| target.join("debug")))
        .ok_or("this test was not started from a target directory")?;
    let path = dir.join(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!(
            "{} is not built: `cargo build --workspace --bins` builds it",
            path.display()
        ))
    }
}

/// cargo's target directory: test programs run in its `PROFILE/deps`.
fn target() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?;
    let deps = exe.ancestors().find(|dir| file_name(dir) == "deps")?;
    deps.parent()?.parent().map(Path::to_owned)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
