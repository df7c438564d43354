//! The IPv4 addresses of the targets with network `simple`: one subnet, the same addresses on every device.
//!
//! The bridge has the first address of the subnet. A target without `ipv4` has the lowest address that no other target
//! has, in the order of names; on a device it keeps that until the next boot, whatever comes and goes beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use super::{Network, TargetName};
use crate::sorting;

/// The subnet of targets that write no prefix length: 10.0.3.0/24.
const DEFAULT: Subnet = Subnet { network: Ipv4Addr::new(10, 0, 3, 0), bits: 24 };

/// A subnet of IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    /// Its first address, which no host has.
    pub network: Ipv4Addr,
    /// The length of its prefix, 8 to 30.
    pub bits: u8,
}

/// What is allowed in place of a subnet that no host may be in.
const NO_HOSTS: &str =
    "a subnet for hosts, such as 10.0.3.0/24: not 0.0.0.0/8, 127.0.0.0/8 or one from 224.0.0.0 on";

/// Whether a host may have this address: not one of this network, of loopback, of a group, or reserved.
pub fn is_for_hosts(address: Ipv4Addr) -> bool {
    (1..224).contains(&address.octets()[0]) && !address.is_loopback()
}

impl Subnet {
    fn mask(self) -> u32 {
        u32::MAX << (32 - u32::from(self.bits))
    }

    fn of(address: Ipv4Addr, bits: u8) -> Self {
        let subnet = Self { network: address, bits };
        Self { network: Ipv4Addr::from(u32::from(address) & subnet.mask()), bits }
    }

    /// The address of the bridge.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) + 1)
    }

    /// Its last address, of broadcasts.
    fn last(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) | !self.mask())
    }

    /// Whether hosts may have its addresses: it has none of this host alone, of groups, or reserved (RFC 6890).
    fn is_for_hosts(self) -> bool {
        // At least 8 bits are the same: it lies in one of these ranges, or in none.
        [self.network, self.last()].into_iter().all(is_for_hosts)
    }

    /// Whether a target may have this address: one of the subnet, but not the network, the bridge or the broadcast.
    fn has_host(self, address: Ipv4Addr) -> bool {
        self.gateway() < address && address < self.last()
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.network, self.bits)
    }
}

/// The subnet of a system, and who has which address of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// The subnet.
    pub subnet: Subnet,
    /// The address of each target with network `simple`.
    pub of: BTreeMap<TargetName, Ipv4Addr>,
}

/// An address that cannot be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadAddress {
    /// The target.
    pub target: TargetName,
    /// What is wrong.
    pub found: String,
    /// What would be right.
    pub allowed: String,
}

/// The addresses of a system in which no target has one.
pub fn none() -> Addresses {
    Addresses { subnet: DEFAULT, of: BTreeMap::new() }
}

/// Gives every target with network `simple` its address. One without `ipv4` keeps that of `before`, if it can; what a target
/// had that is gone is given last.
///
/// # Errors
/// Addresses of two targets, of two subnets, or outside of the subnet; more targets than addresses.
pub fn assign<'a>(
    networks: impl Iterator<Item = (&'a TargetName, &'a Network)>,
    before: &BTreeMap<String, Ipv4Addr>,
) -> Result<Addresses, Vec<BadAddress>> {
    let mut bad = Vec::new();
    let mut subnet: Option<(Subnet, &TargetName)> = None;
    let mut written = Vec::new();
    let mut open = Vec::new();
    for (name, network) in networks {
        let Network::Simple { ipv4, .. } = network else { continue };
        let Some(text) = ipv4.as_deref().filter(|text| !text.is_empty()) else {
            open.push(name);
            continue;
        };
        let (address, bits) =
            text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let Ok(address) = address.parse::<Ipv4Addr>() else { continue };
        written.push((name, address));
        let Some(bits) = bits.and_then(|bits| bits.parse::<u8>().ok()) else { continue };
        if !(8..=30).contains(&bits) {
            let (found, allowed) = (format!("a prefix of {bits} bits"), "8 to 30 bits".to_string());
            bad.push(BadAddress { target: name.clone(), found, allowed });
            continue;
        }
        let own = Subnet::of(address, bits);
        if !own.is_for_hosts() {
            let (found, allowed) = (format!("the subnet {own}"), NO_HOSTS.to_string());
            bad.push(BadAddress { target: name.clone(), found, allowed });
            continue;
        }
        match subnet {
            Some((first, of)) if first != own => {
                let found = format!("the subnet {own}");
                let allowed = format!("one subnet for all targets, and {of} has {first}");
                bad.push(BadAddress { target: name.clone(), found, allowed });
            }
            Some(_) => {}
            None => subnet = Some((own, name)),
        }
    }
    let subnet = subnet.map_or(DEFAULT, |(subnet, _)| subnet);
    let mut taken: BTreeMap<Ipv4Addr, &TargetName> = BTreeMap::new();
    for (name, address) in written {
        let problem = if !bad.is_empty() {
            None
        } else if !subnet.has_host(address) {
            Some(format!("an address of {subnet} other than its first, its last and {}", subnet.gateway()))
        } else {
            taken.get(&address).map(|other| format!("an address that no other target has; {other} has it"))
        };
        if let Some(allowed) = problem {
            bad.push(BadAddress { target: name.clone(), found: address.to_string(), allowed });
        }
        taken.insert(address, name);
    }
    let mut of = sorting::map(taken.iter().map(|(address, name)| ((*name).clone(), *address)));
    open.retain(|name| {
        let kept = before
            .get(name.as_str())
            .filter(|address| subnet.has_host(**address) && !taken.contains_key(address));
        if let Some(address) = kept {
            taken.insert(*address, name);
            of.insert((*name).clone(), *address);
        }
        kept.is_none()
    });
    let left: BTreeSet<Ipv4Addr> = before.values().copied().collect();
    let hosts = || (u32::from(subnet.gateway()) + 1..=u32::from(subnet.last())).map(Ipv4Addr::from);
    let free = |address: &Ipv4Addr| subnet.has_host(*address) && !taken.contains_key(address);
    let mut next = hosts()
        .filter(|address| !left.contains(address))
        .chain(hosts().filter(|address| left.contains(address)))
        .filter(free);
    for name in open {
        if let Some(address) = next.next() {
            of.insert(name.clone(), address);
        } else {
            let found = format!("more targets than {subnet} has addresses");
            bad.push(BadAddress { target: name.clone(), found, allowed: "a larger subnet".into() });
        }
    }
    if bad.is_empty() { Ok(Addresses { subnet, of }) } else { Err(bad) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assigned(addresses: &[(&str, Option<&str>)]) -> Result<Vec<String>, Vec<String>> {
        assigned_after(addresses, &[])
    }

    fn assigned_after(
        addresses: &[(&str, Option<&str>)],
        before: &[(&str, &str)],
    ) -> Result<Vec<String>, Vec<String>> {
        let before =
            before.iter().map(|(name, address)| (name.to_string(), address.parse().unwrap())).collect();
        let networks: Vec<(TargetName, Network)> = addresses
            .iter()
            .map(|(name, ipv4)| {
                let ipv4 = ipv4.map(str::to_string);
                (name.parse().unwrap(), Network::Simple { ipv4, ipv6: None, ports: None })
            })
            .collect();
        assign(networks.iter().map(|(name, network)| (name, network)), &before)
            .map(|all| all.of.iter().map(|(name, address)| format!("{name}={address}")).collect())
            .map_err(|bad| {
                bad.iter().map(|one| format!("{}: {}; {}", one.target, one.found, one.allowed)).collect()
            })
    }

    #[test]
    fn what_writes_no_address_has_the_lowest_that_is_free() {
        let all = [("a", None), ("b", Some("10.0.3.2")), ("c", Some("")), ("d", Some("10.0.3.99/24"))];
        assert_eq!(assigned(&all).unwrap(), ["a=10.0.3.3", "b=10.0.3.2", "c=10.0.3.4", "d=10.0.3.99"]);
        let other = [("a", Some("192.168.7.200/25")), ("b", None)];
        assert_eq!(assigned(&other).unwrap(), ["a=192.168.7.200", "b=192.168.7.130"]);
    }

    #[test]
    fn a_target_keeps_its_address_when_others_come_and_go() {
        let before = [("b", "10.0.3.2"), ("d", "10.0.3.3"), ("f", "10.0.3.4")];
        // `d` has gone: its address is given to no other target while it may still run.
        let all = [("a", None), ("b", None), ("e", None), ("f", Some(""))];
        assert_eq!(
            assigned_after(&all, &before).unwrap(),
            ["a=10.0.3.5", "b=10.0.3.2", "e=10.0.3.6", "f=10.0.3.4"]
        );
        // What is written goes first, and a subnet that has changed leaves nothing to keep.
        let written = [("b", None), ("x", Some("10.0.3.2"))];
        assert_eq!(assigned_after(&written, &before).unwrap(), ["b=10.0.3.5", "x=10.0.3.2"]);
        let moved = [("b", None), ("x", Some("10.0.4.9/24"))];
        assert_eq!(assigned_after(&moved, &before).unwrap(), ["b=10.0.4.2", "x=10.0.4.9"]);
        // Neither the bridge's address nor one that two have.
        let bad = [("a", "10.0.3.1"), ("b", "10.0.3.7"), ("c", "10.0.3.7"), ("d", "10.0.3.255")];
        let all = [("a", None), ("b", None), ("c", None), ("d", None)];
        assert_eq!(
            assigned_after(&all, &bad).unwrap(),
            ["a=10.0.3.2", "b=10.0.3.7", "c=10.0.3.3", "d=10.0.3.4"]
        );
        // Where nothing else is free, what is left is taken.
        let small = [("a", None), ("x", Some("10.0.3.5/29")), ("y", Some("10.0.3.6"))];
        let full = [("p", "10.0.3.2"), ("q", "10.0.3.3"), ("r", "10.0.3.4")];
        assert_eq!(assigned_after(&small, &full).unwrap(), ["a=10.0.3.2", "x=10.0.3.5", "y=10.0.3.6"]);
    }

    #[test]
    fn addresses_that_cannot_be_given_are_named() {
        let bad = |all: &[(&str, Option<&str>)]| assigned(all).unwrap_err();
        assert_eq!(
            bad(&[("a", Some("10.0.3.9")), ("b", Some("10.0.3.9"))]),
            ["b: 10.0.3.9; an address that no other target has; a has it"]
        );
        assert_eq!(
            bad(&[("a", Some("10.0.3.9/24")), ("b", Some("10.0.4.9/24"))]),
            ["b: the subnet 10.0.4.0/24; one subnet for all targets, and a has 10.0.3.0/24"]
        );
        for taken in ["10.0.3.1", "10.0.3.0", "10.0.3.255", "10.0.4.7"] {
            let said = bad(&[("a", Some(taken))]);
            assert_eq!(
                said,
                [format!(
                    "a: {taken}; an address of 10.0.3.0/24 other than its first, its last and 10.0.3.1"
                )]
            );
        }
        for (address, subnet) in [
            ("127.0.0.5/8", "127.0.0.0/8"),
            ("127.9.0.5/24", "127.9.0.0/24"),
            ("0.0.0.5/24", "0.0.0.0/24"),
            ("224.0.0.5/24", "224.0.0.0/24"),
            ("255.255.255.254/30", "255.255.255.252/30"),
        ] {
            let said = bad(&[("a", Some(address)), ("b", None), ("c", None)]);
            assert_eq!(said[0], format!("a: the subnet {subnet}; {NO_HOSTS}"));
        }
        assert_eq!(bad(&[("a", Some("10.0.0.9/0"))]), ["a: a prefix of 0 bits; 8 to 30 bits"]);
        assert_eq!(bad(&[("a", Some("10.0.0.9/31"))]), ["a: a prefix of 31 bits; 8 to 30 bits"]);
        let full = bad(&[("a", Some("10.0.0.2/30")), ("b", None)]);
        assert_eq!(full, ["b: more targets than 10.0.0.0/30 has addresses; a larger subnet"]);
    }
}
