use super::*;
use crate::irq::EventfdSource;
use rustix::event::Timespec;

struct Fds(Vec<Result<Option<Trigger>>>);

impl EventfdSource for Fds {
    fn eventfd(&self, n: usize) -> Result<Option<Trigger>> {
        self.0[n].clone()
    }
}

fn trigger() -> Trigger {
    Trigger::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

/// How often it was signalled since last asked.
fn taken(trigger: &Trigger) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(trigger.fd(), &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(Errno::AGAIN) => 0,
        Err(errno) => panic!("{errno}"),
    }
}

fn request<'a>(index: u32, start: u32, count: u32, action: Action, data: Data<'a>) -> SetIrqs<'a> {
    SetIrqs {
        index,
        start,
        count,
        action,
        data,
    }
}

fn irqs() -> PciIrqs {
    PciIrqs::new(Counts {
        intx: true,
        msi: 4,
        msix: 8,
    })
}

fn enable(irqs: &PciIrqs, index: u32, start: u32, triggers: &[&Trigger]) -> Result<u32> {
    let fds = Fds(triggers
        .iter()
        .map(|trigger| Ok(Some((*trigger).clone())))
        .collect());
    let count = triggers.len() as u32;
    irqs.set(request(
        index,
        start,
        count,
        Action::Trigger,
        Data::Eventfd(&fds),
    ))
}

#[test]
fn intx_is_a_level() {
    let irqs = irqs();
    let fd = trigger();
    irqs.set_level(true);
    enable(&irqs, irq::INTX, 0, &[&fd]).unwrap();
    assert_eq!(taken(&fd), 1, "the line was up when INTx was enabled");
    irqs.set_level(true);
    assert_eq!(taken(&fd), 0, "automasked");
    let unmask = request(irq::INTX, 0, 1, Action::Unmask, Data::None);
    irqs.set(unmask).unwrap();
    assert_eq!(taken(&fd), 1, "unmask while asserted fires again");
    irqs.set_level(false);
    irqs.set(unmask).unwrap();
    assert_eq!(taken(&fd), 0);
    irqs.set(request(irq::INTX, 0, 1, Action::Mask, Data::Bool(&[1])))
        .unwrap();
    irqs.set_level(true);
    assert_eq!(taken(&fd), 0, "masked");
    irqs.set(request(irq::INTX, 0, 1, Action::Unmask, Data::Bool(&[0])))
        .unwrap();
    assert_eq!(taken(&fd), 0, "0 leaves the mask");
    irqs.set(request(irq::INTX, 0, 1, Action::Unmask, Data::Bool(&[2])))
        .unwrap();
    assert_eq!(taken(&fd), 1);
}

#[test]
fn intx_unmasked_by_eventfd() {
    let irqs = irqs();
    let fd = trigger();
    let input = trigger();
    enable(&irqs, irq::INTX, 0, &[&fd]).unwrap();
    let fds = Fds(vec![Ok(Some(input.clone()))]);
    let install = request(irq::INTX, 0, 1, Action::Unmask, Data::Eventfd(&fds));
    // One that comes later takes the place of the first, which then does nothing.
    let first = trigger();
    let others = Fds(vec![Ok(Some(first.clone()))]);
    let early = request(irq::INTX, 0, 1, Action::Unmask, Data::Eventfd(&others));
    irqs.set(early).unwrap();
    irqs.set(install).unwrap();
    assert_eq!(irqs.set(install), Err(Errno::BUSY), "the same one again");
    irqs.set_level(true);
    assert_eq!(taken(&fd), 1);
    input.signal();
    let mut ready = [PollFd::new(fd.fd(), PollFlags::IN)];
    assert_eq!(
        poll(
            &mut ready,
            Some(&Timespec {
                tv_sec: 5,
                tv_nsec: 0
            })
        )
        .unwrap(),
        1
    );
    assert_eq!(taken(&fd), 1);
    let none = Fds(vec![Ok(None)]);
    irqs.set(request(
        irq::INTX,
        0,
        1,
        Action::Unmask,
        Data::Eventfd(&none),
    ))
    .unwrap();
    irqs.set(install).unwrap();
}

#[test]
fn one_type_at_a_time() {
    let irqs = irqs();
    let fd = trigger();
    enable(&irqs, irq::INTX, 0, &[&fd]).unwrap();
    assert_eq!(enable(&irqs, irq::MSI, 0, &[&fd]), Err(Errno::INVAL));
    irqs.set(request(irq::INTX, 0, 0, Action::Trigger, Data::None))
        .unwrap();
    assert_eq!(
        irqs.set(request(irq::INTX, 0, 0, Action::Trigger, Data::None)),
        Err(Errno::INVAL),
        "disabled already"
    );
    enable(&irqs, irq::MSI, 0, &[&fd]).unwrap();
    assert_eq!(enable(&irqs, irq::MSIX, 0, &[&fd]), Err(Errno::INVAL));
    irqs.fire(0);
    assert_eq!(taken(&fd), 1);
    irqs.set(request(irq::MSI, 0, 0, Action::Trigger, Data::None))
        .unwrap();
    irqs.fire(0);
    assert_eq!(taken(&fd), 0);
}

#[test]
fn no_pin_no_intx() {
    let irqs = PciIrqs::new(Counts {
        intx: false,
        msi: 1,
        msix: 0,
    });
    assert_eq!(
        enable(&irqs, irq::INTX, 0, &[&trigger()]),
        Err(Errno::NODEV)
    );
}

#[test]
fn vectors() {
    let irqs = irqs();
    let (a, b) = (trigger(), trigger());
    let five: Vec<&Trigger> = vec![&a; 5];
    assert_eq!(
        enable(&irqs, irq::MSI, 0, &five),
        Ok(4),
        "fewer than asked: says how many"
    );
    assert!(!irqs.uses_messages());
    enable(&irqs, irq::MSI, 0, &[&a, &b]).unwrap();
    assert_eq!(
        enable(&irqs, irq::MSI, 2, &[&a]),
        Err(Errno::INVAL),
        "MSI does not grow"
    );
    irqs.set(request(
        irq::MSI,
        0,
        2,
        Action::Trigger,
        Data::Bool(&[0, 1]),
    ))
    .unwrap();
    assert_eq!((taken(&a), taken(&b)), (0, 1));
    irqs.set(request(irq::MSI, 0, 2, Action::Trigger, Data::None))
        .unwrap();
    assert_eq!((taken(&a), taken(&b)), (1, 1));
    let bad = Fds(vec![Ok(Some(a.clone())), Err(Errno::BADF)]);
    let replace = request(irq::MSI, 0, 2, Action::Trigger, Data::Eventfd(&bad));
    assert_eq!(irqs.set(replace), Err(Errno::BADF));
    irqs.fire(0);
    irqs.fire(1);
    assert_eq!(
        (taken(&a), taken(&b)),
        (0, 0),
        "a failure clears the whole block"
    );
    assert!(irqs.uses_messages());
    assert_eq!(
        irqs.set(request(irq::MSI, 0, 1, Action::Mask, Data::None)),
        Err(Errno::NOTTY)
    );
}

#[test]
fn msix_grows_sparsely() {
    let irqs = irqs();
    let (a, b) = (trigger(), trigger());
    let hole = Fds(vec![Ok(None)]);
    irqs.set(request(
        irq::MSIX,
        0,
        1,
        Action::Trigger,
        Data::Eventfd(&hole),
    ))
    .unwrap();
    enable(&irqs, irq::MSIX, 5, &[&a]).unwrap();
    enable(&irqs, irq::MSIX, 1, &[&b]).unwrap();
    irqs.fire(5);
    irqs.fire(1);
    irqs.fire(7);
    assert_eq!((taken(&a), taken(&b)), (1, 1));
    assert_eq!(enable(&irqs, irq::MSIX, 8, &[&a]), Err(Errno::INVAL));
}

#[test]
fn enabling_nothing_is_out_of_range() {
    let none = Fds(Vec::new());
    let irqs = irqs();
    let empty = request(irq::MSIX, 0, 0, Action::Trigger, Data::Eventfd(&none));
    assert_eq!(irqs.set(empty), Err(Errno::RANGE));
}

#[test]
fn req_tells_whether_the_user_took_it() {
    let irqs = irqs();
    assert_eq!(irqs.request(), RequestChannel::None);
    assert_eq!(
        irqs.set(request(irq::REQ, 0, 1, Action::Trigger, Data::None)),
        Err(Errno::INVAL)
    );
    irqs.set(request(irq::REQ, 0, 1, Action::Trigger, Data::Bool(&[1])))
        .unwrap();
    let fd = trigger();
    enable(&irqs, irq::REQ, 0, &[&fd]).unwrap();
    assert_eq!(irqs.request(), RequestChannel::Signalled);
    assert_eq!(taken(&fd), 1);
    irqs.set(request(irq::REQ, 0, 0, Action::Trigger, Data::None))
        .unwrap();
    assert_eq!(irqs.request(), RequestChannel::None);
    assert_eq!(
        irqs.set(request(irq::REQ, 0, 0, Action::Trigger, Data::Bool(&[]))),
        Err(Errno::INVAL)
    );
}

#[test]
fn a_full_counter_does_not_block() {
    let fd = Trigger::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    rustix::io::write(fd.fd(), &(u64::MAX - 1).to_ne_bytes()).unwrap();
    fd.signal();
    let mut count = [0; 8];
    rustix::io::read(fd.fd(), &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), u64::MAX - 1);
}
