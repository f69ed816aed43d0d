//! The file system that a guest starts with: an archive in the kernel's "newc" cpio format
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`), written without privileges.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_777;

/// An archive being written. Directories above an entry come by themselves.
#[derive(Debug, Default)]
pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    names: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// Adds a directory.
    pub(crate) fn dir(&mut self, name: &str) {
        self.directories(&normal(Path::new(name)));
    }

    /// Adds a file with these contents; one that is there already stays.
    pub(crate) fn file(&mut self, name: &str, executable: bool, contents: &[u8]) {
        let mode = REGULAR | if executable { 0o755 } else { 0o644 };
        self.entry(Path::new(name), mode, contents);
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, name: &str, target: &str) {
        self.entry(Path::new(name), SYMLINK, target.as_bytes());
    }

    /// Copies a file of the machine.
    pub(crate) fn copy(&mut self, from: &Path, name: &str) -> io::Result<()> {
        let mode = fs::metadata(from)?.permissions().mode();
        self.file(name, mode & 0o111 != 0, &fs::read(from)?);
        Ok(())
    }

    /// Copies a program of the machine to `name`, and the libraries it is linked to to the places
    /// where its loader looks for them.
    pub(crate) fn program(&mut self, from: &Path, name: &str) -> io::Result<()> {
        self.copy(from, name)?;
        let output = Command::new("ldd").arg(from).output()?;
        // ldd fails for a static program, which needs nothing.
        for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
            self.copy(Path::new(&library), &library)?;
        }
        Ok(())
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.raw("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &Path, mode: u32, contents: &[u8]) {
        let name = normal(name);
        self.directories(name.parent().unwrap_or(Path::new("")));
        if self.names.insert(name.clone()) {
            self.raw(&name.to_string_lossy(), mode, contents);
        }
    }

    /// Adds a directory, relative to the root, and those above it, topmost first.
    fn directories(&mut self, path: &Path) {
        if path.as_os_str().is_empty() || self.names.contains(path) {
            return;
        }
        self.directories(path.parent().unwrap_or(Path::new("")));
        self.names.insert(path.to_owned());
        self.raw(&path.to_string_lossy(), DIRECTORY, &[]);
    }

    /// One entry: a header of 13 hexadecimal words, the name, the contents, each padded to 4.
    fn raw(&mut self, name: &str, mode: u32, contents: &[u8]) {
        let inode = self.names.len() + 1;
        let fields = [
            inode,
            mode as usize,
            0,
            0,
            1,
            0,
            contents.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

/// A path without its root and without dots, as the archive has it.
fn normal(path: &Path) -> PathBuf {
    path.components()
        .filter(|component| matches!(component, Component::Normal(_)))
        .collect()
}

/// The paths in what `ldd` prints: `name => /path (address)` or `/path (address)`.
fn libraries(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once("=> ").map_or(line, |(_, path)| path);
            let path = path.split(' ').next()?;
            path.starts_with('/').then(|| path.to_owned())
        })
        .collect()
}

/// The modules to load for `names`, in order, as paths below `dir`; those built into the kernel are
/// left out.
///
/// # Errors
/// A name that the kernel does not have.
pub(crate) fn modules(dir: &Path, names: &[&str]) -> Result<Vec<PathBuf>, String> {
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
    };
    resolve(&read("modules.dep")?, &read("modules.builtin")?, names)
        .map(|paths| paths.into_iter().map(|path| dir.join(path)).collect())
}

fn resolve(dep: &str, builtin: &str, names: &[&str]) -> Result<Vec<String>, String> {
    let mut order: Vec<String> = Vec::new();
    for name in names {
        let found = dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| module_name(path) == *name);
        let Some((path, needs)) = found else {
            if builtin.lines().any(|path| module_name(path) == *name) {
                continue;
            }
            return Err(format!("the guest's kernel has no module {name}"));
        };
        // depmod lists what a module needs with the deepest last.
        let mut needed: Vec<&str> = needs.split_whitespace().collect();
        needed.reverse();
        for path in needed.into_iter().chain([path]) {
            if !order.iter().any(|have| have == path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// `kernel/drivers/vfio/pci/vfio-pci.ko.xz` is `vfio_pci`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split(".ko")
        .next()
        .unwrap_or_default()
        .replace('-', "_")
}

/// The contents of a module; newer kernels' are compressed.
pub(crate) fn module_contents(path: &Path) -> Result<Vec<u8>, String> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz")
            .arg("-dc")
            .arg(path)
            .output()
            .map_err(|error| format!("xz: {error}"))?;
        if !output.status.success() {
            return Err(format!("xz cannot unpack {}", path.display()));
        }
        return Ok(output.stdout);
    }
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_and_parents_come_once() {
        let mut archive = Initramfs::default();
        archive.dir("/dev");
        archive.file("/etc/a/b", false, b"12345");
        archive.file("/etc/a/c", true, b"");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let headers: Vec<&str> = text.split("070701").skip(1).collect();
        let names: Vec<&str> = headers
            .iter()
            .map(|header| header[104..].split('\0').next().unwrap_or_default())
            .collect();
        assert_eq!(
            names,
            ["dev", "etc", "etc/a", "etc/a/b", "etc/a/c", "TRAILER!!!"]
        );
        assert_eq!(&headers[3][8..16], "000081a4");
        assert_eq!(&headers[3][48..56], "00000005");
    }

    #[test]
    fn ldd_lines_give_paths() {
        let text = "\tlinux-vdso.so.1 (0x7ff)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        assert_eq!(
            libraries(text),
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
        assert!(libraries("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let dep = "kernel/a/vfio-pci.ko: kernel/a/vfio-pci-core.ko kernel/a/vfio.ko.xz\nkernel/a/vfio.ko.xz:\n";
        let builtin = "kernel/drivers/tty/serial/8250/8250_pci.ko\n";
        assert_eq!(
            resolve(dep, builtin, &["vfio_pci", "8250_pci", "vfio"]).expect("all are there"),
            [
                "kernel/a/vfio.ko.xz",
                "kernel/a/vfio-pci-core.ko",
                "kernel/a/vfio-pci.ko"
            ]
        );
        assert!(resolve(dep, builtin, &["nothing"]).is_err());
    }
}
