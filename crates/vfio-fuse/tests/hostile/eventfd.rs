//! Eventfds that do not take what they are given.

use crate::common::FIRE;
use crate::scene::{Bystander, Session, alone, host};
use crate::uapi::*;
use std::time::{Duration, Instant};

#[test]
fn a_full_counter_blocks_nobody() {
    alone!("a_full_counter_blocks_nobody", || {
        let Some(host) = host("a_full_counter_blocks_nobody") else {
            return;
        };
        let (_one, _) = host.device("one");
        let beside = Bystander::start(&host);
        let s = Session::start(&host, 0);
        let c = &s.client;
        let event = c.sys(libc::SYS_eventfd2, &[0, 0]).unwrap();
        let data = (event as u32).to_ne_bytes();
        c.irqs(s.device, EVENTFD | TRIGGER, 0, 0, 1, &data).unwrap();
        let full = (u64::MAX - 1).to_ne_bytes();
        let arg = c.put(&full);
        assert_eq!(c.sys(libc::SYS_write, &[event, arg, 8]), Ok(8));
        for _ in 0..20 {
            let begun = Instant::now();
            assert_eq!(c.pwrite(s.device, s.registers + FIRE, &[1]), Ok(1));
            assert!(begun.elapsed() < Duration::from_millis(500));
            c.irqs(s.device, NONE | UNMASK, 0, 0, 1, &[]).unwrap();
        }
        let flags = c
            .sys(libc::SYS_fcntl, &[event, libc::F_GETFL as u64, 0])
            .unwrap();
        assert_eq!(flags & libc::O_NONBLOCK as u64, 0, "the client's flag");
        assert_eq!(c.sys(libc::SYS_read, &[event, c.arena, 8]), Ok(8));
        assert_eq!(c.peek(c.arena, 8), full, "nothing was added or lost");
        c.pwrite(s.device, s.registers + FIRE, &[1]).unwrap();
        assert_eq!(c.sys(libc::SYS_read, &[event, c.arena, 8]), Ok(8));
        assert_eq!(long(&c.peek(c.arena, 8), 0), 1);
        // Filled over and over by another of its threads, while the device fires.
        let filler = c.fork();
        c.irqs(s.device, NONE | UNMASK, 0, 0, 1, &[]).unwrap();
        for _ in 0..300 {
            let arg = filler.put(&full);
            // It may be full already: the write then waits, and the next read lets it go on.
            filler.start_sys(libc::SYS_write, &[event, arg, 8]);
            let begun = Instant::now();
            c.pwrite(s.device, s.registers + FIRE, &[1]).unwrap();
            c.irqs(s.device, NONE | UNMASK, 0, 0, 1, &[]).unwrap();
            assert!(begun.elapsed() < Duration::from_secs(2));
            while filler.finish(Duration::from_millis(20)).is_none() {
                c.sys(libc::SYS_read, &[event, c.arena, 8]).unwrap();
            }
            c.sys(libc::SYS_read, &[event, c.arena, 8]).unwrap();
        }
        beside.end();
    });
}
