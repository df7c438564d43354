//! Many devices, each a process with a system of its own, that update at once through one cache on their site.

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use mosfs::internals::deploy::System;
use mosfs::internals::image::oci::Descriptor;

use crate::debian::{Config, Debian};
use crate::kills::{copy, is_long, served};
use crate::nginx::Nginx;
use crate::place::{Place, layers_of, load, text};
use crate::server::Server;

/// A registry that counts, and devices that run version 200 of it. Version 201 is in the registry, and the devices
/// have a cache as a mirror, which is empty.
struct Fleet {
    place: Place,
    origin: Server,
    devices: usize,
    layers: Vec<Descriptor>,
}

impl Fleet {
    /// `host` starts the cache before a registry, and says where it is.
    fn new(devices: usize, layers: &[usize], host: impl FnOnce(&Server) -> String) -> Self {
        let (place, origin, _) = served(&[1000]);
        place.install(&origin.source("p"));
        for at in 0..devices {
            let folder = place.path(&format!("device-{at}"));
            fs::create_dir(&folder).unwrap();
            for part in ["system", "config"] {
                copy(&place.path(part), &folder.join(part));
            }
        }
        place.publish(201, layers);
        load(&place.publisher.store(), 201, "p", &origin);
        let layers = layers_of(&place.publisher.store(), 201);
        let conf = format!(
            "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
            origin.host(),
            host(&origin)
        );
        fs::write(place.path("registries.conf"), conf).unwrap();
        origin.settle();
        origin.take_log();
        Self { place, origin, devices, layers }
    }

    fn size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }

    /// The bytes of the layers that the origin has sent.
    fn sent(&self) -> u64 {
        self.layers.iter().map(|layer| self.origin.sent(&layer.digest)).sum()
    }

    /// All devices at once; each of them must finish. A cache that is busy is waited for: who loses patience asks the
    /// registry itself.
    fn update(&self, devices: std::ops::Range<usize>) {
        let source = self.origin.source("p");
        let children: Vec<_> = devices
            .clone()
            .map(|at| {
                let mut command = self.place.command(&["update", &source, "--net-timeout", "120"]);
                let folder = self.place.path(&format!("device-{at}"));
                command.env("MOSFS_SYSTEM", folder.join("system")).env("MOSFS_CONFIG", folder.join("config"));
                command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
            })
            .collect();
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
        for at in devices {
            let system = System::at(self.place.path(&format!("device-{at}/system")));
            let pending = system.state().unwrap().pending.expect("a pending version");
            assert_eq!(pending.deployment.version, 201);
            let store = system.store().unwrap();
            assert!(self.layers.iter().all(|layer| store.has(layer)));
        }
    }
}

/// How many devices update at once.
fn devices() -> usize {
    if is_long() { 50 } else { 6 }
}

const LAYERS: [usize; 3] = [300_000, 200_000, 100_000];

fn docker_registry(origin: &Server) -> Debian {
    Debian::start(&Config { proxy_of: Some(origin.url()), ..Config::default() })
}

/// All at once through an empty cache: the registry sends each blob once.
#[test]
fn devices_that_come_at_once_cost_the_registry_one_of_each_blob() {
    let mut cache = None;
    let fleet = Fleet::new(devices(), &LAYERS, |origin| cache.insert(Nginx::before(&origin.url())).host());
    let begun = Instant::now();
    fleet.update(0..fleet.devices);
    let elapsed = begun.elapsed();
    let log = fleet.origin.take_log();
    for layer in &fleet.layers {
        let asked: Vec<_> = log.iter().filter(|seen| seen.gets(&layer.digest)).collect();
        assert_eq!(asked.len(), 1, "{asked:?}");
        assert_eq!(fleet.origin.sent(&layer.digest), layer.size);
    }
    println!(
        "nginx: {} devices at once, {} bytes of layers each: {} ms; the registry sent {} bytes of layers",
        fleet.devices,
        fleet.size(),
        elapsed.as_millis(),
        fleet.sent()
    );
}

/// docker-registry fetches a blob twice for the first client that asks for it: once to send it on, and once for
/// itself. Afterwards the registry is asked for none of them, however many devices come at once.
#[test]
fn devices_that_come_after_the_first_one_cost_the_registry_nothing() {
    let mut cache = None;
    let fleet = Fleet::new(devices() + 1, &LAYERS, |origin| cache.insert(docker_registry(origin)).host());
    fleet.update(0..1);
    // The cache finishes its own copies some time after it has answered.
    let source = fleet.origin.source("p");
    let mut first = 0;
    for warm in 0.. {
        assert!(warm < 50, "the cache does not fill");
        while fleet.sent() < 2 * fleet.size() {
            thread::sleep(Duration::from_millis(10));
        }
        first = fleet.sent();
        fleet.place.pull(&source, &format!("warm-{warm}"));
        if fleet.sent() == first {
            break;
        }
    }
    let begun = Instant::now();
    fleet.update(1..fleet.devices);
    let elapsed = begun.elapsed();
    assert_eq!(fleet.sent(), first, "the registry sends no more");
    println!(
        "docker-registry: {} devices at once after the first one, {} bytes of layers each: {} ms; the registry sent \
         {first} bytes of layers for the first, and none for the others",
        fleet.devices - 1,
        fleet.size(),
        elapsed.as_millis()
    );
}

/// Before docker-registry has kept a blob, it asks for it again for each device. All of them finish all the same.
#[test]
fn devices_that_come_before_a_cache_is_filled_finish() {
    let mut cache = None;
    let fleet = Fleet::new(devices(), &LAYERS, |origin| cache.insert(docker_registry(origin)).host());
    let begun = Instant::now();
    fleet.update(0..fleet.devices);
    let (elapsed, sent) = (begun.elapsed(), fleet.sent());
    assert!(sent >= fleet.size() && sent <= (fleet.devices as u64 + 1) * fleet.size(), "{sent}");
    println!(
        "docker-registry, empty: {} devices at once, {} bytes of layers each: {} ms; the registry sent {sent} bytes of \
         layers, {:.1} of each",
        fleet.devices,
        fleet.size(),
        elapsed.as_millis(),
        sent as f64 / fleet.size() as f64
    );
}
