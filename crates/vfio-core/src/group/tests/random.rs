//! Random sequences against a model, and many threads at once.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

const CONTAINERS: usize = 3;
const CONTEXTS: usize = 2;
/// Devices of each group; the last group is hardware.
const MEMBERS: [&[usize]; 3] = [&[0], &[1], &[2, 3]];
const DEVICES: usize = 4;
const HARDWARE: usize = 2;

fn group_of(device: usize) -> usize {
    MEMBERS
        .iter()
        .position(|members| members.contains(&device))
        .unwrap()
}

#[derive(Clone, Copy, Debug)]
enum Step {
    OpenContainer(usize),
    CloseContainer(usize),
    SetIommu(usize),
    OpenGroup(usize),
    CloseGroup(usize),
    SetContainer(usize, usize),
    SetIommufd(usize, usize),
    UnsetContainer(usize),
    OpenDevice(usize),
    OpenNode(usize),
    Bind(usize, usize),
    CloseFile(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0..CONTAINERS).prop_map(Step::OpenContainer),
        1 => (0..CONTAINERS).prop_map(Step::CloseContainer),
        2 => (0..CONTAINERS).prop_map(Step::SetIommu),
        3 => (0..MEMBERS.len()).prop_map(Step::OpenGroup),
        2 => (0..MEMBERS.len()).prop_map(Step::CloseGroup),
        3 => (0..MEMBERS.len(), 0..CONTAINERS).prop_map(|(g, c)| Step::SetContainer(g, c)),
        2 => (0..MEMBERS.len(), 0..CONTEXTS).prop_map(|(g, i)| Step::SetIommufd(g, i)),
        2 => (0..MEMBERS.len()).prop_map(Step::UnsetContainer),
        6 => (0..DEVICES).prop_map(Step::OpenDevice),
        2 => (0..DEVICES).prop_map(Step::OpenNode),
        2 => (any::<usize>(), 0..CONTEXTS).prop_map(|(f, i)| Step::Bind(f, i)),
        4 => any::<usize>().prop_map(Step::CloseFile),
    ]
}

/// What a file of a device is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Use {
    Nothing,
    /// Of a group, through a container.
    Contained,
    /// Of a group, through a context.
    Compat(usize),
    Bound(usize),
}

impl Use {
    fn is_by_group(self) -> bool {
        matches!(self, Use::Contained | Use::Compat(_))
    }

    /// Through another context than this.
    fn is_elsewhere(self, context: usize) -> bool {
        matches!(self, Use::Compat(other) | Use::Bound(other) if other != context)
    }
}

/// What a group has as its container.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Set {
    Container(usize),
    Iommufd(usize),
}

/// What should be.
#[derive(Default)]
struct Model {
    /// Which groups are in it, and whether it has a backend. Nobody may have its file any more.
    containers: [(BTreeSet<usize>, bool); CONTAINERS],
    /// Open (a descriptor exists), and the container it is in.
    groups: [Option<(bool, Option<Set>)>; 3],
    files: Vec<(usize, Use)>,
    sessions: [u32; DEVICES],
}

impl Model {
    fn is_open(&self, device: usize, by: impl Fn(Use) -> bool) -> bool {
        self.files
            .iter()
            .any(|(of, used)| *of == device && by(*used))
    }

    /// How many members are open in a way.
    fn members(&self, group: usize, by: impl Fn(Use) -> bool + Copy) -> u32 {
        let members = MEMBERS[group].iter();
        members.filter(|device| self.is_open(**device, by)).count() as u32
    }

    fn kept(&self, group: usize) -> bool {
        self.members(group, |used| used == Use::Contained) > 0
    }

    fn bound(&self, group: usize) -> bool {
        self.members(group, |used| matches!(used, Use::Bound(_))) > 0
    }

    fn leave(&mut self, group: usize) {
        if let Some((_, set)) = &mut self.groups[group]
            && let Some(Set::Container(container)) = set.take()
        {
            let (members, backend) = &mut self.containers[container];
            members.remove(&group);
            *backend &= !members.is_empty();
        }
    }

    fn settle(&mut self, group: usize) {
        if matches!(self.groups[group], Some((false, _))) && !self.kept(group) {
            self.leave(group);
            self.groups[group] = None;
        }
    }
}

/// What is.
struct Real {
    world: World,
    registrations: Vec<(Registration, Arc<Seen>)>,
    containers: [Option<(i32, Arc<Container>)>; CONTAINERS],
    contexts: Vec<(i32, Arc<Iommufd>)>,
    groups: [Option<Arc<GroupFile>>; 3],
    files: Vec<Arc<DeviceFile>>,
}

impl Real {
    fn new() -> Real {
        let world = World::impatient();
        let iommu = world.hardware();
        let registrations = (0..DEVICES)
            .map(|n| {
                let hardware = (group_of(n) == HARDWARE).then_some(&iommu);
                device(&world.core, &format!("d{n}"), hardware)
            })
            .collect();
        Real {
            contexts: (0..CONTEXTS).map(|_| world.context()).collect(),
            world,
            registrations,
            containers: Default::default(),
            groups: Default::default(),
            files: Vec::new(),
        }
    }

    fn device(&self, n: usize) -> &Device {
        self.registrations[n].0.device()
    }

    fn group(&self, g: usize) -> Arc<Group> {
        self.device(MEMBERS[g][0]).vfio_group().unwrap()
    }
}

/// Makes the step in both; what each said.
fn make(real: &mut Real, model: &mut Model, step: Step) -> (Result, Result) {
    let world = &real.world;
    let nothing = (Ok(()), Ok(()));
    match step {
        Step::OpenContainer(c) => {
            // A container that groups are still in goes on without a file; a new one is another.
            if real.containers[c].is_none() && model.containers[c].0.is_empty() {
                real.containers[c] = Some(world.container());
                model.containers[c] = Default::default();
            }
            nothing
        }
        Step::CloseContainer(c) => {
            if let Some((_, container)) = real.containers[c].take() {
                container.close();
            }
            nothing
        }
        Step::SetIommu(c) => {
            let Some((_, container)) = &real.containers[c] else {
                return nothing;
            };
            let said = world.set_iommu(container).map(drop);
            let (members, backend) = &mut model.containers[c];
            if members.is_empty() || *backend {
                return (said, Err(Errno::INVAL));
            }
            *backend = true;
            (said, Ok(()))
        }
        Step::OpenGroup(g) => {
            let said = real.group(g).open(opener());
            let taken = model.groups[g].is_some() || model.bound(g);
            let should = if taken { Err(Errno::BUSY) } else { Ok(()) };
            if !taken {
                model.groups[g] = Some((true, None));
            }
            match said {
                Ok(file) => {
                    real.groups[g] = Some(file);
                    (Ok(()), should)
                }
                Err(errno) => (Err(errno), should),
            }
        }
        Step::CloseGroup(g) => {
            if let Some(file) = real.groups[g].take() {
                file.release();
                if let Some((fds, _)) = &mut model.groups[g] {
                    *fds = false;
                }
                model.settle(g);
            }
            nothing
        }
        Step::SetContainer(g, c) => {
            let (Some(file), Some((fd, _))) = (&real.groups[g], &real.containers[c]) else {
                return nothing;
            };
            let said = world.set_container(file, *fd).map(drop);
            if let Some((_, Some(_))) = model.groups[g] {
                return (said, Err(Errno::INVAL));
            }
            if model.members(g, |used| matches!(used, Use::Compat(_))) > 0 {
                return (said, Err(Errno::BUSY));
            }
            model.groups[g] = Some((true, Some(Set::Container(c))));
            model.containers[c].0.insert(g);
            (said, Ok(()))
        }
        Step::SetIommufd(g, i) => {
            let Some(file) = &real.groups[g] else {
                return nothing;
            };
            let said = world.set_container(file, real.contexts[i].0).map(drop);
            if let Some((_, Some(_))) = model.groups[g] {
                return (said, Err(Errno::INVAL));
            }
            model.groups[g] = Some((true, Some(Set::Iommufd(i))));
            (said, Ok(()))
        }
        Step::UnsetContainer(g) => {
            let Some(file) = &real.groups[g] else {
                return nothing;
            };
            let said = world.unset_container(file).map(drop);
            if !matches!(model.groups[g], Some((_, Some(_)))) {
                return (said, Err(Errno::INVAL));
            }
            let native = matches!(model.groups[g], Some((_, Some(Set::Container(_)))));
            if native && model.kept(g) {
                return (said, Err(Errno::BUSY));
            }
            model.leave(g);
            (said, Ok(()))
        }
        Step::OpenDevice(d) => {
            let g = group_of(d);
            let Some(file) = &real.groups[g] else {
                return nothing;
            };
            let said = world.open_device(file, &format!("d{d}"));
            let set = model.groups[g].and_then(|(_, set)| set);
            let session = model
                .files
                .iter()
                .find(|(of, used)| *of == d && used.is_by_group());
            let should = match (session, set) {
                (_, None) => Err(Errno::INVAL),
                (Some((_, used)), Some(_)) => Ok(*used),
                (None, Some(Set::Container(c))) if !model.containers[c].1 => Err(Errno::INVAL),
                (None, Some(Set::Container(_))) => Ok(Use::Contained),
                (None, Some(Set::Iommufd(i)))
                    if g == HARDWARE && model.members(g, |used| used.is_elsewhere(i)) > 0 =>
                {
                    Err(Errno::PERM)
                }
                (None, Some(Set::Iommufd(i))) => Ok(Use::Compat(i)),
            };
            if let Ok(used) = should {
                model.sessions[d] += u32::from(session.is_none());
                model.files.push((d, used));
            }
            (said.map(|file| real.files.push(file)), should.map(|_| ()))
        }
        Step::OpenNode(d) => {
            let said = real.device(d).open_cdev(opener());
            model.files.push((d, Use::Nothing));
            (said.map(|file| real.files.push(file)), Ok(()))
        }
        Step::Bind(f, i) => {
            if real.files.is_empty() {
                return nothing;
            }
            let f = f % real.files.len();
            let said = world.bind_file(&real.files[f], real.contexts[i].0);
            let (d, used) = model.files[f];
            let g = group_of(d);
            let should = if used != Use::Nothing {
                Err(Errno::INVAL)
            } else if model.groups[g].is_some() {
                Err(Errno::BUSY)
            } else if model.is_open(d, |used| used != Use::Nothing) {
                Err(Errno::INVAL)
            } else if g == HARDWARE && model.members(g, |used| used.is_elsewhere(i)) > 0 {
                Err(Errno::PERM)
            } else {
                model.files[f].1 = Use::Bound(i);
                model.sessions[d] += 1;
                Ok(())
            };
            (said.map(drop), should)
        }
        Step::CloseFile(f) => {
            if !real.files.is_empty() {
                let f = f % real.files.len();
                real.files.swap_remove(f).release();
                let (d, _) = model.files.swap_remove(f);
                model.settle(group_of(d));
            }
            nothing
        }
    }
}

/// What can be seen at any moment agrees.
fn agree(real: &Real, model: &Model) -> Result<(), TestCaseError> {
    for (g, state) in model.groups.iter().enumerate() {
        let group = real.group(g);
        prop_assert_eq!(group.opener().is_some(), state.is_some());
        let kept = model.members(g, |used| used == Use::Contained);
        let compat = model.members(g, |used| matches!(used, Use::Compat(_)));
        prop_assert_eq!(group.opened_devices(), (kept, compat));
        if let Some(file) = &real.groups[g] {
            let is_set = matches!(state, Some((_, Some(_))));
            let flags = real.world.status(file).unwrap();
            prop_assert_eq!(flags.contains(StatusFlags::CONTAINER_SET), is_set);
        }
    }
    for d in 0..DEVICES {
        let users = model.files.iter().filter(|(of, _)| *of == d).count() as u32;
        prop_assert_eq!(real.device(d).users(), users);
        prop_assert_eq!(
            real.device(d).is_open(),
            model.is_open(d, |used| used != Use::Nothing)
        );
        let closes = real.registrations[d].1.closes.load(Ordering::SeqCst);
        let now = u32::from(real.device(d).is_open());
        prop_assert_eq!(closes + now, model.sessions[d]);
    }
    Ok(())
}

/// Closes everything, and everything is as at the beginning.
fn end(real: Real, model: &Model, closes: Vec<usize>) -> Result<(), TestCaseError> {
    let Real {
        world,
        registrations,
        containers,
        contexts,
        groups,
        files,
    } = real;
    let mut left: Vec<Box<dyn FnOnce()>> = Vec::new();
    for (_, container) in containers.iter().flatten() {
        let container = Arc::clone(container);
        left.push(Box::new(move || container.close()));
    }
    for file in groups.into_iter().flatten() {
        left.push(Box::new(move || file.release()));
    }
    for file in files {
        left.push(Box::new(move || file.release()));
    }
    for (_, context) in contexts {
        left.push(Box::new(move || context.close()));
    }
    for at in closes {
        if left.is_empty() {
            break;
        }
        left.swap_remove(at % left.len())();
    }
    left.into_iter().for_each(|close| close());
    for (_, container) in containers.iter().flatten() {
        prop_assert_eq!(world.set_iommu(container), Err(Errno::INVAL));
    }
    for (registration, _) in &registrations {
        let group = registration.device().vfio_group().unwrap();
        let file = group.open(opener()).unwrap();
        prop_assert_eq!(world.status(&file), Ok(StatusFlags::VIABLE));
        file.release();
    }
    for (d, (registration, seen)) in registrations.into_iter().enumerate() {
        let leaving = registration.unregister();
        prop_assert!(leaving.is_done());
        leaving.wait();
        prop_assert_eq!(seen.closes.load(Ordering::SeqCst), model.sessions[d]);
        seen.dma.lock().unwrap().take();
        prop_assert_eq!(Arc::strong_count(&seen), 1, "released");
    }
    prop_assert!(world.core.groups().is_empty());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn against_a_model(
        steps in prop::collection::vec(step(), 1..80),
        closes in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        let mut real = Real::new();
        let mut model = Model::default();
        for (at, step) in steps.into_iter().enumerate() {
            let (said, should) = make(&mut real, &mut model, step);
            prop_assert_eq!(said, should, "step {}: {:?}", at, step);
            agree(&real, &model)?;
        }
        end(real, &model, closes)?;
    }
}

/// Everybody at once, on one group: whatever succeeds, nothing is left of it.
#[test]
fn many_threads_leave_nothing() {
    let world = Arc::new(World::impatient());
    let iommu = world.hardware();
    let (one, first) = device(&world.core, "one", Some(&iommu));
    let (two, second) = device(&world.core, "two", Some(&iommu));
    let group = one.device().vfio_group().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (iommufd, context) = world.context();
    let by_group = (0..3).map(|n| {
        let (world, group, stop) = (Arc::clone(&world), Arc::clone(&group), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut opened = 0_u32;
            while !stop.load(Ordering::SeqCst) {
                let Ok(file) = group.open(opener()) else {
                    std::thread::yield_now();
                    continue;
                };
                let (fd, container) = world.container();
                world.set_container(&file, fd).unwrap();
                world.set_iommu(&container).unwrap();
                let name = ["one", "two"][n % 2];
                let device = world.open_device(&file, name).unwrap();
                assert_eq!(device.read(0, &mut [0; 4]), Ok(4));
                opened += 1;
                match opened % 3 {
                    0 => {
                        file.release();
                        container.close();
                        device.release();
                    }
                    1 => {
                        device.release();
                        container.close();
                        world.unset_container(&file).unwrap();
                        file.release();
                    }
                    _ => {
                        container.close();
                        device.release();
                        file.release();
                    }
                }
            }
            opened
        })
    });
    let by_node = (0..2).map(|n| {
        let (world, stop) = (Arc::clone(&world), Arc::clone(&stop));
        let device = [one.device(), two.device()][n].clone();
        std::thread::spawn(move || {
            let mut opened = 0_u32;
            while !stop.load(Ordering::SeqCst) {
                match world.bind(&device, iommufd) {
                    Ok(file) => {
                        assert_eq!(file.read(0, &mut [0; 4]), Ok(4));
                        file.release();
                        opened += 1;
                    }
                    Err(errno) => assert!(matches!(errno, Errno::BUSY | Errno::INVAL)),
                }
            }
            opened
        })
    });
    let threads: Vec<_> = by_group.chain(by_node).collect();
    let end = std::time::Instant::now() + Duration::from_secs(10);
    let enough =
        || first.closes.load(Ordering::SeqCst) > 500 && second.closes.load(Ordering::SeqCst) > 500;
    while !enough() && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    stop.store(true, Ordering::SeqCst);
    let opened: u32 = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .sum();
    let closed = first.closes.load(Ordering::SeqCst) + second.closes.load(Ordering::SeqCst);
    assert_eq!(opened, closed);
    assert_eq!(group.opened_devices(), (0, 0));
    let file = group.open(opener()).unwrap();
    assert_eq!(world.status(&file), Ok(StatusFlags::VIABLE));
    file.release();
    context.close();
    one.unregister().wait();
    two.unregister().wait();
    assert!(!group.is_alive());
}

/// A client that is killed in SET_CONTAINER: its file goes while the command is under way.
#[test]
fn a_group_closed_while_it_joins_is_free_for_the_next() {
    let world = World::impatient();
    let iommu = world.hardware();
    let (one, _) = device(&world.core, "one", Some(&iommu));
    let group = one.device().vfio_group().unwrap();
    let (fd, container) = world.container();
    let mut interrupted = 0;
    for round in 0..400 {
        let file = group.open(opener()).unwrap();
        let joined = std::thread::scope(|scope| {
            let joins = scope.spawn(|| world.set_container(&file, fd));
            for _ in 0..round {
                std::hint::spin_loop();
            }
            file.release();
            joins.join().unwrap()
        });
        interrupted += u32::from(joined == Err(Errno::BADF));
        let next = group.open(opener()).unwrap();
        assert_eq!(world.set_container(&next, fd), Ok(0), "round {round}");
        assert_eq!(world.unset_container(&next), Ok(0));
        next.release();
    }
    assert!(interrupted > 0);
    container.close();
    one.unregister().wait();
}
