//! Clients whose server looks for their messages without sleeping: they are served as others are, it
//! ends as a connection ends, and nobody else waits for it.

mod common;

use common::*;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vfio_core::device::Policy;
use vfio_core::model::faux;
use vfio_user::client::Client;
use vfio_user::{Offer, OfferOptions, Options};

const POLLED: OfferOptions = OfferOptions {
    uids: Vec::new(),
    gids: Vec::new(),
    poll: true,
};

/// One test after the other: each keeps processors busy, and the next is not to wait for them.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server that polls, whatever the machine has.
fn host(pollers: usize) -> Host {
    let options = Options {
        pollers,
        ..Options::default()
    };
    Host::with(options, POLLED)
}

/// More devices of a host's, each with a socket of its own.
struct More(Vec<(PathBuf, Offer, faux::Device)>);

impl More {
    fn new(host: &Host, count: u32) -> More {
        let offered = |n: u32| {
            let driver = Driver(Arc::clone(&host.seen));
            let faux = faux::Device::create(&host.core, &format!("more{n}"), driver).unwrap();
            let path = host.dir.path().join(n.to_string());
            let listener = UnixListener::bind(&path).unwrap();
            let device = host.core.device(n).unwrap();
            let offer = host.server.offer(&device, listener, POLLED).unwrap();
            (path, offer, faux)
        };
        More((1..=count).map(offered).collect())
    }

    fn connect(&self) -> Vec<Client> {
        let paths = self.0.iter().map(|(path, ..)| path);
        paths.map(|path| Client::connect(path).unwrap()).collect()
    }
}

/// Has a register read, and be what it must.
fn speak(client: &mut Client) {
    let mut value = [0xee; 4];
    assert_eq!(client.region_read(0, VALUE, &mut value).unwrap(), 4);
    assert_eq!(value, [0; 4]);
}

fn until_polled(host: &Host, count: usize) {
    until(&format!("{count} are polled"), || {
        host.server.polled() == count
    });
}

#[test]
fn it_begins_with_a_message_and_ends_with_silence() {
    let _alone = alone();
    let host = host(1);
    let mut client = host.connect();
    for _ in 0..2 {
        speak(&mut client);
        until_polled(&host, 1);
        // Silence costs it nothing else.
        until_polled(&host, 0);
        assert!(host.offer().client().is_some());
    }
    speak(&mut client);
    until_polled(&host, 1);
}

#[test]
fn it_is_not_for_those_who_did_not_ask() {
    let _alone = alone();
    let options = Options {
        pollers: 8,
        ..Options::default()
    };
    let host = Host::with(options, OfferOptions::default());
    let mut client = host.connect();
    for _ in 0..1000 {
        speak(&mut client);
        assert_eq!(host.server.polled(), 0);
    }
}

#[test]
fn who_has_not_said_version_is_not_polled() {
    let _alone = alone();
    let host = host(2);
    let mut raw = host.raw();
    raw.send(&[1, 2, 3]);
    let mut client = host.connect();
    for _ in 0..1000 {
        speak(&mut client);
        assert!(host.server.polled() <= 1);
    }
    assert_eq!(host.server.polled(), 1);
    drop(raw);
}

#[test]
fn a_client_that_goes_while_it_is_polled_closes_the_device() {
    let _alone = alone();
    let host = host(1);
    for _ in 0..20 {
        let mut client = host.connect();
        speak(&mut client);
        until_polled(&host, 1);
        drop(client);
        host.until_free();
    }
    until_polled(&host, 0);
    assert_eq!(host.seen.closed.load(Ordering::SeqCst), 20);
}

#[test]
fn half_a_message_while_it_is_polled_is_waited_for() {
    let _alone = alone();
    let host = host(1);
    let mut raw = host.raw();
    assert_eq!(raw.hello(0, Some("{}")).0.errno(), None);
    until_polled(&host, 1);
    let asked = vfio_user::wire::RegionAccess {
        offset: VALUE,
        region: 0,
        count: 4,
    };
    let payload = zerocopy::IntoBytes::as_bytes(&asked);
    let message = Raw::message(5, vfio_user::wire::command::REGION_READ, 0, payload);
    for byte in &message {
        raw.send(&[*byte]);
    }
    assert_eq!(raw.receive().0.id, 5);
}

#[test]
fn a_withdrawn_offer_ends_it() {
    let _alone = alone();
    let mut host = host(1);
    let mut client = host.connect();
    speak(&mut client);
    until_polled(&host, 1);
    drop(host.offer.take());
    until("the device is closed", || !host.device().is_open());
    assert!(client.device_info().is_err());
    until_polled(&host, 0);
}

#[test]
fn an_unbind_that_cuts_off_ends_it() {
    let _alone = alone();
    let mut host = host(1);
    let mut client = host.connect();
    speak(&mut client);
    until_polled(&host, 1);
    let outcome = host.faux.take().unwrap().destroy(Policy::Disassociate);
    assert_eq!(outcome.wait_for(SOON), Some(Ok(())));
    assert!(client.device_info().is_err());
    until_polled(&host, 0);
}

#[test]
fn an_unbind_with_a_deadline_is_not_held_up_by_one_that_speaks() {
    let _alone = alone();
    let mut host = host(1);
    let mut client = host.connect();
    let speaker = std::thread::spawn(move || {
        // Without a pause, until it is cut off.
        while client.device_info().is_ok() {}
    });
    until_polled(&host, 1);
    let policy = Policy::WaitThenDisassociate(Duration::from_millis(50));
    let outcome = host.faux.take().unwrap().destroy(policy);
    assert_eq!(outcome.wait_for(SOON), Some(Ok(())));
    speaker.join().unwrap();
    until_polled(&host, 0);
}

#[test]
fn a_server_that_is_dropped_ends_it() {
    let _alone = alone();
    let host = host(1);
    let mut client = host.connect();
    speak(&mut client);
    until_polled(&host, 1);
    let Host { core, server, .. } = host;
    drop(server);
    assert!(client.device_info().is_err());
    let device = core.device(0).unwrap();
    until("the device is closed", || !device.is_open());
}

#[test]
fn a_server_with_one_thread_serves_the_others_too() {
    let _alone = alone();
    let options = Options {
        threads: 1,
        pollers: 8,
        ..Options::default()
    };
    let host = Host::with(options, POLLED);
    let more = More::new(&host, 3);
    let mut clients = more.connect();
    clients.push(host.connect());
    for _ in 0..200 {
        clients.iter_mut().for_each(speak);
    }
}

#[test]
fn so_many_are_polled_and_the_rest_is_served() {
    let _alone = alone();
    let host = host(2);
    let more = More::new(&host, 8);
    let mut clients = more.connect();
    let mut most = 0;
    for _ in 0..500 {
        clients.iter_mut().for_each(speak);
        most = most.max(host.server.polled());
    }
    assert_eq!(most, 2);
    // New ones are heard, and refused or served, while others poll.
    assert!(Client::connect(&more.0[0].0).is_err());
    speak(&mut host.connect());
    // Whose place is free is somebody else's.
    until_polled(&host, 0);
    speak(&mut clients[7]);
    until_polled(&host, 1);
    speak(&mut clients[3]);
    until_polled(&host, 2);
    drop(clients);
    until_polled(&host, 0);
}
