//! Everything a request asks of its client, asked of real processes.

mod child;

use std::sync::Arc;

use child::Child;
use child::pattern;
use client_process::Caller;
use client_process::Errno;
use client_process::FileId;
use client_process::Memory;
use client_process::Pid;
use client_process::holders;
use client_process::is_eventfd;
use rustix::fd::AsFd;
use rustix::fd::AsRawFd;

const PAGE: u64 = 4096;

#[test]
fn child() {
    child::obey();
}

fn caller(child: &Child) -> Caller {
    Caller::new(child.pid()).unwrap()
}

fn pid(n: i32) -> Pid {
    Pid::from_raw(n).unwrap()
}

#[test]
fn copies_end_where_the_client_could_not_go_itself() {
    let mut client = Child::start();
    let from = caller(&client);
    let addr = client.ask("map private 12288 rw");
    let mut buf = vec![0; 8192];
    from.copy_in(addr + 100, &mut buf).unwrap();
    assert!((0..8192).all(|at| buf[at] == pattern(at + 100)));
    from.copy_out(addr + 4090, b"over the edge").unwrap();
    assert_eq!(
        client.ask(&format!("peek {}", addr + 4090)),
        u64::from(b'o')
    );
    assert_eq!(
        client.ask(&format!("peek {}", addr + 4096 + 6)),
        u64::from(b'e')
    );

    // The middle page read-only, the last gone.
    client.tell(&format!("protect {} 4096 r", addr + PAGE));
    client.tell(&format!("unmap {} 4096", addr + 2 * PAGE));
    assert_eq!(from.copy_out(addr + PAGE, b"x"), Err(Errno::FAULT));
    assert_eq!(
        client.ask(&format!("peek {}", addr + PAGE)),
        u64::from(b'h')
    );
    assert_eq!(
        from.copy_in_prefix(addr + 2 * PAGE - 10, &mut [0; 20]),
        Ok(10)
    );
    assert_eq!(from.copy_in_prefix(addr + 2 * PAGE, &mut [0; 20]), Ok(0));
    assert_eq!(
        from.copy_in(addr + 2 * PAGE - 10, &mut [0; 20]),
        Err(Errno::FAULT)
    );
    assert_eq!(from.copy_in(addr + 2 * PAGE - 10, &mut [0; 10]), Ok(()));
    client.tell(&format!("protect {addr} 4096 none"));
    assert_eq!(from.copy_in(addr, &mut [0]), Err(Errno::FAULT));

    // Addresses that no process has.
    for addr in [0, u64::MAX, u64::MAX - 3, 1 << 63, 0xffff_8000_0000_0000] {
        assert_eq!(
            from.copy_in(addr, &mut [0; 8]),
            Err(Errno::FAULT),
            "{addr:#x}"
        );
        assert_eq!(from.copy_out(addr, &[0; 8]), Err(Errno::FAULT), "{addr:#x}");
    }
    assert_eq!(from.copy_in(u64::MAX, &mut []), Ok(()));

    client.kill();
    assert_eq!(from.copy_in(addr + PAGE, &mut [0]), Err(Errno::FAULT));
    assert_eq!(from.copy_out(addr, &[0]), Err(Errno::FAULT));
    assert_eq!(from.identity(), Err(Errno::SRCH));
}

#[test]
fn descriptors_come_as_the_same_open_file() {
    let mut client = Child::start();
    let from = caller(&client);
    let event = i32::try_from(client.ask("eventfd")).unwrap();
    let fd = from.get_fd(event).unwrap();
    assert!(is_eventfd(&fd));
    assert_eq!(from.is_same_open_file(event, fd.as_fd()), Ok(true));

    let null = i32::try_from(client.ask("open /dev/null")).unwrap();
    let other = from.get_fd(null).unwrap();
    assert!(!is_eventfd(&other));
    assert_eq!(from.is_same_open_file(event, other.as_fd()), Ok(false));

    let path = i32::try_from(client.ask("opath /dev/null")).unwrap();
    assert_eq!(from.get_fd(path).unwrap_err(), Errno::BADF);
    client.tell(&format!("close {null}"));
    for n in [null, -1, i32::MIN, i32::MAX, 9999] {
        assert_eq!(from.get_fd(n).unwrap_err(), Errno::BADF, "{n}");
    }
    client.kill();
    assert_eq!(from.get_fd(event).unwrap_err(), Errno::SRCH);
}

/// Whether the kernel shows a thread's own table: PIDFD_THREAD, Linux 6.9 (`kernel/pid.c`,
/// `pidfd_open`). Before that it shows the leader's.
fn asks_threads() -> bool {
    vfiod_tests::skip::kernel_is_at_least(6, 9)
}

#[test]
fn a_thread_is_asked_for_its_own_table_and_memory() {
    let mut client = Child::start();
    for kind in ["shared", "unshared"] {
        let answer = client.tell(&format!("thread {kind}"));
        let (tid, fd) = answer.split_once(' ').unwrap();
        let thread = Caller::new(tid.parse().unwrap()).unwrap();
        assert_ne!(thread.tid(), pid(client.pid()));
        let identity = thread.identity().unwrap();
        assert_eq!(identity.tgid, pid(client.pid()));
        let fd = fd.parse().unwrap();
        if kind == "unshared" && !asks_threads() {
            // Never the leader's file of that number.
            assert_eq!(thread.get_fd(fd).unwrap_err(), Errno::BADF);
            continue;
        }
        let event = thread.get_fd(fd).unwrap();
        assert!(is_eventfd(&event));
        let mut count = [0; 8];
        rustix::io::read(&event, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 7);
        if kind == "unshared" {
            // The leader has no such descriptor, or another file.
            assert_ne!(
                caller(&client).is_same_open_file(fd, event.as_fd()),
                Ok(true)
            );
        }
        let addr = client.ask("map private 4096 rw");
        let mut byte = [9];
        thread.copy_in(addr + 5, &mut byte).unwrap();
        assert_eq!(byte, [5]);
        assert!(
            Memory::of(thread)
                .unwrap()
                .read(addr + 5, &mut byte)
                .is_ok()
        );
    }
}

#[test]
fn identity_is_the_kernels() {
    let client = Child::start();
    let from = caller(&client);
    let me = Caller::new(rustix::process::getpid().as_raw_nonzero().get()).unwrap();
    let who = from.identity().unwrap();
    assert_eq!((who.tgid, who.tid), (pid(client.pid()), pid(client.pid())));
    assert_eq!(who.uid, rustix::process::geteuid().as_raw());
    assert_eq!(who.gid, rustix::process::getegid().as_raw());
    assert!(who.start_ticks >= me.identity().unwrap().start_ticks);
    assert_eq!(who.cap_eff, me.identity().unwrap().cap_eff);
    assert_eq!(from.exe().unwrap(), std::env::current_exe().unwrap());
    assert_eq!(from.memlock_limit(), me.memlock_limit());
    assert_eq!(Caller::new(0), Err(Errno::SRCH));
    assert_eq!(Caller::new(-5), Err(Errno::SRCH));
}

#[test]
fn memory_is_one_address_space_and_no_other() {
    let mut client = Child::start();
    let memory = Memory::of(caller(&client)).unwrap();
    assert!(
        Arc::ptr_eq(&memory, &Memory::of(caller(&client)).unwrap()),
        "one per address space"
    );
    let addr = client.ask("map private 12288 rw");
    let mut buf = [0; 64];
    memory.read(addr + PAGE - 32, &mut buf).unwrap();
    assert_eq!(buf[63], pattern(4096 + 31));
    memory.write(addr + PAGE - 1, b"ab").unwrap();
    assert_eq!(
        client.ask(&format!("peek {}", addr + PAGE)),
        u64::from(b'b')
    );

    // Read-only pages stay as they are, and nothing before them is written either.
    client.tell(&format!("protect {} 4096 r", addr + PAGE));
    assert_eq!(memory.write(addr + PAGE - 1, b"xy"), Err(Errno::FAULT));
    assert_eq!(
        client.ask(&format!("peek {}", addr + PAGE - 1)),
        u64::from(b'a')
    );
    assert_eq!(
        client.ask(&format!("peek {}", addr + PAGE)),
        u64::from(b'b')
    );
    client.tell(&format!("unmap {} 4096", addr + 2 * PAGE));
    assert_eq!(
        memory.read(addr + 2 * PAGE - 1, &mut [0; 2]),
        Err(Errno::FAULT)
    );
    assert_eq!(memory.query(addr + 2 * PAGE), Err(Errno::FAULT));
    for addr in [0, u64::MAX, u64::MAX - 3, 1 << 63] {
        assert_eq!(
            memory.read(addr, &mut [0; 8]),
            Err(Errno::FAULT),
            "{addr:#x}"
        );
        assert_eq!(memory.write(addr, &[0; 8]), Err(Errno::FAULT), "{addr:#x}");
    }

    // A child made by fork has its own.
    let forked = i32::try_from(client.ask("fork")).unwrap();
    let held = rustix::process::pidfd_open(pid(forked), rustix::process::PidfdFlags::empty());
    let held = held.unwrap();
    let copy = Memory::of(Caller::new(forked).unwrap()).unwrap();
    assert!(!Arc::ptr_eq(&memory, &copy));
    copy.write(addr, b"Z").unwrap();
    assert_eq!(client.ask(&format!("peek {addr}")), 0);

    // The program after exec is not reached, whatever it has at that address, and where the other had
    // what the kernel tells programs apart by (AT_RANDOM, 25).
    let auxv = std::fs::read(format!("/proc/{}/auxv", client.pid())).unwrap();
    let (words, _) = auxv.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|w| u64::from_ne_bytes(*w)).collect();
    let pair = words.chunks(2).find(|pair| pair[0] == 25).unwrap();
    let mark = pair[1] & !(PAGE - 1);
    assert_eq!(client.tell("exec"), "ready");
    let at = client.ask(&format!("remap private 8192 rw {mark}"));
    assert_eq!(at, mark);
    assert!(!memory.is_alive());
    assert_eq!(client.ask(&format!("remap private 4096 rw {addr}")), addr);
    let known = Memory::copy_in(caller(&client), addr, &mut [0]).unwrap();
    assert!(known.is_none(), "another program of the same process");
    assert_eq!(memory.read(addr, &mut [0]), Err(Errno::FAULT));
    assert_eq!(memory.write(addr, &[1]), Err(Errno::FAULT));
    assert_eq!(memory.write_checked(addr, &[1]), Err(Errno::FAULT));
    assert_eq!(memory.query(addr), Err(Errno::FAULT));
    let after = Memory::of(caller(&client)).unwrap();
    assert!(!Arc::ptr_eq(&memory, &after));
    assert_eq!(after.read(addr, &mut [0]), Ok(()));
    client.kill();
    assert!(!after.is_alive());
    assert_eq!(after.read(addr, &mut [0]), Err(Errno::FAULT));
    assert_eq!(Memory::of(caller(&client)).unwrap_err(), Errno::FAULT);
    // It dies with its parent, but not if it has not come to ask for that yet.
    let _ = rustix::process::pidfd_send_signal(&held, rustix::process::Signal::KILL);
}

#[test]
fn an_argument_and_its_address_space_are_told_by_one_look() {
    let mut client = Child::start();
    let answer = client.tell("thread shared");
    let tid = answer.split_once(' ').unwrap().0;
    let thread = Caller::new(tid.parse().unwrap()).unwrap();
    let addr = client.ask("map private 4096 rw") + 5;
    let mut byte = [0];
    let known = Memory::copy_in(thread, addr, &mut byte).unwrap();
    assert!(known.is_none() && byte == [5], "it has never asked");
    let memory = Memory::of(thread).unwrap();
    let known = Memory::copy_in(thread, addr, &mut byte).unwrap().unwrap();
    assert!(Arc::ptr_eq(&known, &memory) && byte == [5]);
    for addr in [0, u64::MAX, 1 << 63] {
        let known = Memory::copy_in(thread, addr, &mut [0; 2]);
        assert_eq!(known.unwrap_err(), Errno::FAULT, "{addr:#x}");
    }
    // Another thread asks, then the first again: each is told apart from the other.
    let leader = Memory::of(caller(&client)).unwrap();
    assert!(Arc::ptr_eq(&leader, &memory));
    let known = Memory::copy_in(thread, addr, &mut byte).unwrap();
    assert!(known.is_none_or(|known| Arc::ptr_eq(&known, &memory)));
    assert!(Arc::ptr_eq(&Memory::of(thread).unwrap(), &memory));

    // The thread ends, and a child made by fork gets its number. What the kernel has written at exec
    // is the same in both.
    client.tell("end");
    let forked = client.tell(&format!("fork-as {tid}"));
    if forked != tid {
        println!("cannot choose a number: {forked}");
        return;
    }
    client.tell(&format!("poke {addr} 77"));
    let known = Memory::copy_in(thread, addr, &mut byte).unwrap();
    assert!(known.is_none() && byte == [5], "the child's byte");
    let copy = Memory::of(thread).unwrap();
    assert_eq!(
        (copy.tgid(), memory.tgid()),
        (thread.tid(), pid(client.pid()))
    );
    copy.read(addr, &mut byte).unwrap();
    assert_eq!(byte, [5]);
    memory.read(addr, &mut byte).unwrap();
    assert_eq!(byte, [77]);
    let known = Memory::copy_in(thread, addr, &mut byte).unwrap().unwrap();
    assert!(Arc::ptr_eq(&known, &copy));
}

#[test]
fn mappings_of_memory_are_opened_and_others_are_not() {
    let mut client = Child::start();
    let memory = Memory::of(caller(&client)).unwrap();
    for kind in ["memfd", "shared"] {
        let addr = client.ask(&format!("map {kind} 8192 rw"));
        let mapping = memory.query(addr + PAGE).unwrap();
        assert_eq!(
            (mapping.start, mapping.end, mapping.offset),
            (addr, addr + 8192, 0)
        );
        assert!(mapping.shared && mapping.readable && mapping.writable);
        let file = memory.open_mapping(&mapping).unwrap();
        assert_eq!(FileId::of(&file).unwrap(), mapping.file);
        rustix::io::pwrite(&file, b"!", PAGE).unwrap();
        assert_eq!(
            client.ask(&format!("peek {}", addr + PAGE)),
            u64::from(b'!'),
            "{kind}"
        );

        // Once it is something else it cannot be opened by mistake.
        assert_eq!(client.ask(&format!("remap {kind} 8192 rw {addr}")), addr);
        assert_eq!(memory.open_mapping(&mapping).unwrap_err(), Errno::NOENT);
        client.tell(&format!("protect {addr} 8192 r"));
        let mapping = memory.query(addr).unwrap();
        assert!(!mapping.writable);
        let file = memory.open_mapping(&mapping).unwrap();
        assert_eq!(
            rustix::io::pwrite(&file, b"!", 0),
            Err(Errno::BADF),
            "read-only"
        );
    }
    let private = client.ask("map private 4096 rw");
    assert_eq!(
        memory
            .open_mapping(&memory.query(private).unwrap())
            .unwrap_err(),
        Errno::INVAL
    );
    // A file of a disk, or of a FUSE server: opening it could wait.
    let path = std::env::current_exe()
        .unwrap()
        .with_extension(client.pid().to_string());
    std::fs::write(&path, [0; 4096]).unwrap();
    let is_memory = rustix::fs::fcntl_get_seals(std::fs::File::open(&path).unwrap()).is_ok();
    let fd = client.ask(&format!("openrw {}", path.display()));
    let addr = client.ask(&format!("mapfd {fd} 4096 rw 0"));
    std::fs::remove_file(&path).unwrap();
    let opened = memory.open_mapping(&memory.query(addr).unwrap());
    assert_eq!(opened.err(), (!is_memory).then_some(Errno::INVAL));
}

#[test]
fn holders_are_those_who_hold_it_now() {
    let mut client = Child::start();
    let mut other = Child::start();
    let fd = i32::try_from(client.ask("memfd 8192")).unwrap();
    let mine = caller(&client).get_fd(fd).unwrap();
    let id = FileId::of(&mine).unwrap();
    let me = rustix::process::getpid();
    let who = |except: &[Pid]| {
        holders(&[id], except)
            .into_iter()
            .map(|h| (h.pid, h.fds, h.mapped_bytes))
            .collect::<Vec<_>>()
    };
    assert_eq!(who(&[me]), [(pid(client.pid()), vec![fd], 0)]);
    assert!(who(&[]).contains(&(me, vec![mine.as_raw_fd()], 0)));

    // Inherited by fork, mapped, and then closed: the mapping alone still holds it.
    let addr = client.ask(&format!("mapfd {fd} 8192 rw 0"));
    let forked = i32::try_from(client.ask("fork")).unwrap();
    let mut expected = [
        (pid(client.pid()), vec![fd], 8192),
        (pid(forked), vec![fd], 8192),
    ];
    expected.sort_by_key(|(pid, ..)| pid.as_raw_nonzero());
    assert_eq!(who(&[me]), expected);
    client.tell(&format!("close {fd}"));
    assert_eq!(who(&[me, pid(forked)]), [(pid(client.pid()), vec![], 8192)]);
    client.tell(&format!("unmap {addr} 8192"));
    assert_eq!(
        who(&[me]),
        [(pid(forked), vec![fd], 8192)],
        "the opener is out of it"
    );

    // A thread's own table.
    let answer = other.tell("thread unshared");
    let (tid, event) = answer.split_once(' ').unwrap();
    let event: i32 = event.parse().unwrap();
    let thread = Caller::new(tid.parse().unwrap()).unwrap();
    match thread.get_fd(event) {
        Ok(event) => assert!(is_eventfd(&event)),
        Err(errno) => assert_eq!((errno, asks_threads()), (Errno::BADF, false)),
    }

    let holder = holders(&[id], &[me]).remove(0);
    let age = std::time::SystemTime::now()
        .duration_since(holder.since)
        .unwrap_or_default();
    assert!(age < std::time::Duration::from_secs(600), "{age:?}");
    assert_eq!(
        holder.comm,
        Caller::new(forked).unwrap().identity().unwrap().comm
    );
    rustix::process::kill_process(pid(forked), rustix::process::Signal::KILL).unwrap();
}
