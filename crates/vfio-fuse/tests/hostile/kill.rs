//! Clients that die at any instant.

use crate::client::{Client, now};
use crate::common::{DMA_READ, until};
use crate::scene::{Bystander, Session, alone, descriptors, host, settles, threads};
use crate::uapi::*;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Starts something and kills the client a moment later, a thousand times; the moments cover the
/// whole of each call. The next client opens and binds, and nothing is left of the former.
#[test]
fn a_thousand_deaths() {
    alone!("a_thousand_deaths", || {
        let Some(host) = host("a_thousand_deaths") else {
            return;
        };
        let (_device, seen) = host.device("one");
        let beside = Bystander::start(&host);
        let dev = host.dev.as_ref().unwrap();
        let parent = Client::start();
        let path = host.node(0);
        let mut quiet = (0, 0);
        for round in 0_u64..1000 {
            // A fork is a client with a process of its own, and cheap.
            let c = parent.fork();
            let what = round % 5;
            let delay = Duration::from_nanos(round * 7919 % 400_000);
            if what == 0 {
                let mut name = path.as_os_str().as_encoded_bytes().to_vec();
                name.push(0);
                let name = c.put(&name);
                let args = [libc::AT_FDCWD as u64, name, libc::O_RDWR as u64, 0];
                c.start_sys(libc::SYS_openat, &args);
            } else {
                let device = c.open(&path).unwrap();
                let iommu = c.open(&host.iommu()).unwrap();
                if what == 1 {
                    let arg = c.put(&bind_arg(iommu));
                    c.start_sys(libc::SYS_ioctl, &[device, BIND.into(), arg, 0]);
                } else {
                    // The close of the one before may take its time on a busy machine.
                    until("the bind", || c.bind(device, iommu).is_ok());
                    let ioas = c.ioas(iommu).unwrap();
                    c.attach(device, ioas).unwrap();
                    let at = c.region(device, 0).unwrap().2;
                    let memory = c.arena + 65536;
                    let flags = MAP_RW | MAP_FIXED;
                    if what == 2 {
                        let mut arg = words(&[40, flags, ioas, 0]);
                        for value in [memory, 65536, 0] {
                            arg.extend(value.to_ne_bytes());
                        }
                        let arg = c.put(&arg);
                        c.start_sys(libc::SYS_ioctl, &[iommu, IOAS_MAP.into(), arg, 0]);
                    } else {
                        c.map(iommu, ioas, flags, memory, 65536, 0).unwrap();
                        let arg = c.put(&0_u64.to_ne_bytes());
                        if what == 3 {
                            let args = [device, arg, 8, at + DMA_READ];
                            c.start_sys(libc::SYS_pwrite64, &args);
                        } else {
                            c.start_sys(libc::SYS_exit_group, &[0, 0, 0, 0]);
                        }
                    }
                }
            }
            let begun = Instant::now();
            while begun.elapsed() < delay {
                std::hint::spin_loop();
            }
            let pid = c.pid as u64;
            c.kill();
            // Its parent reaps it, so that no number is ever mistaken.
            assert_eq!(parent.sys(libc::SYS_wait4, &[pid, 0, 0, 0]), Ok(pid));
            if round % 100 == 50 {
                until("all closed", || dev.open_files() == (1, 1));
                if round == 50 {
                    quiet = (descriptors(), threads());
                }
            }
        }
        until("all closed", || dev.open_files() == (1, 1));
        until("the last close", || {
            seen.opened.load(Ordering::SeqCst) == seen.closed.load(Ordering::SeqCst)
        });
        let next = Session::start(&host, 0);
        assert!(next.client.pread(next.device, next.registers, 8).is_ok());
        next.client.kill();
        beside.end();
        // Nothing grew; the bystander's session has ended since.
        settles("descriptors", quiet.0, descriptors);
        settles("threads", quiet.1 + 1, threads);
        assert!(now() > 0);
    });
}
