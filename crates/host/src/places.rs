//! Limits the connections to a shared server. Each peer has a few places, so that a peer that holds connections open
//! takes places only from itself. Peers on this machine have a pool of their own, as large as that of all others
//! together.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The open connections, counted by peer.
#[derive(Debug, Clone)]
pub struct Places {
    most: usize,
    most_of_one: usize,
    // Std mutex: no await happens under it.
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// The place of one connection; returned on drop.
#[derive(Debug)]
pub struct Place {
    of: IpAddr,
    places: Places,
}

impl Places {
    /// `most` places for peers elsewhere and again as many for peers on this machine, with `most_of_one` for each peer.
    pub fn new(most: usize, most_of_one: usize) -> Self {
        Self { most, most_of_one, taken: Arc::default() }
    }

    /// Takes a place for another connection of this peer, if there is one left.
    pub fn take(&self, peer: IpAddr) -> Option<Place> {
        let of = one_peer(peer);
        let mut taken = self.lock();
        let of_its_kind = taken.iter().filter(|(other, _)| is_near(**other) == is_near(of));
        let all: usize = of_its_kind.map(|(_, taken)| taken).sum();
        let own = taken.get(&of).copied().unwrap_or_default();
        if all >= self.most || own >= self.most_of_one {
            return None;
        }
        taken.insert(of, own + 1);
        Some(Place { of, places: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        match taken.get_mut(&self.of) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(taken.remove(&self.of)),
        }
    }
}

/// Whether this peer is on this machine.
pub fn is_near(peer: IpAddr) -> bool {
    peer.to_canonical().is_loopback()
}

/// Counts the addresses that one host can choose among as one peer.
fn one_peer(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) if !ip.is_loopback() => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        ip => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 64;
    const MOST_OF_ONE: usize = 8;

    #[test]
    fn a_peer_has_a_few_places_and_all_together_have_a_bound() {
        let places = Places::new(MOST, MOST_OF_ONE);
        let peer = |number: u8| IpAddr::from([10, 0, 0, number]);
        let mut of_one: Vec<_> = (0..MOST_OF_ONE).map(|_| places.take(peer(1)).unwrap()).collect();
        assert!(places.take(peer(1)).is_none(), "one peer has its share");
        assert!(places.take("::ffff:10.0.0.1".parse().unwrap()).is_none(), "by whatever name");
        assert!(places.take(peer(2)).is_some(), "and another has its own");
        of_one.pop();
        assert!(places.take(peer(1)).is_some(), "what was given back can be taken");
        let all: Vec<_> = (0..=u8::MAX).filter_map(|number| places.take(peer(number))).collect();
        assert_eq!(all.len() + of_one.len(), MOST);
        let near: Vec<_> = (0..20).filter_map(|_| places.take([127, 0, 0, 1].into())).collect();
        assert_eq!(near.len(), MOST_OF_ONE, "those on this machine have their own");
        drop((all, of_one, near));
        assert!(places.lock().is_empty(), "nothing is kept of those who left");
        let v6: Vec<_> = (0..20).filter_map(|n| places.take(format!("fd00::{n:x}").parse().unwrap())).collect();
        assert_eq!(v6.len(), MOST_OF_ONE, "a host has as many addresses of its network as it likes");
    }
}
