//! Multicast groups and the queue pairs attached to them.
//!
//! Members in this process get a datagram from its sender's thread. For the others the group is one of IP: as long
//! as it has a member here, a socket hears it, and the background thread hands on what that gets. A group whose
//! address is of the other IP version than the device's is one of this process alone.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::event::{Timespec, epoll};

use super::Device;
use super::counters::DeviceCounter;
use super::egress::Origin;
use super::ingress::MULTICAST;
use super::peer::address_of_gid;
use super::queue_pair::QueuePair;
use super::scratch::Scratch;
use crate::net::{Envelope, GroupSocket};
use crate::proto::MAX_PACKET_LEN;
use crate::wire::ROCE_V2_PORT;

/// Queue pairs that one group may have here, and groups, as on the kernel's Soft-RoCE.
pub(crate) const MAX_MEMBERS: usize = 56;
pub(crate) const MAX_GROUPS: usize = 8192;

/// Who is attached to what, and the sockets that hear it. Lists: groups are few, and datagrams to them rare.
#[derive(Debug)]
pub(crate) struct Multicast {
    groups: RwLock<Groups>,
    /// Watches all sockets.
    epoll: OwnedFd,
    any_socket: AtomicBool,
}

#[derive(Debug, Default)]
struct Groups {
    members: Vec<([u8; 16], Arc<QueuePair>)>,
    joined: Vec<Joined>,
    /// The number of the next socket.
    next: u64,
}

#[derive(Debug)]
struct Joined {
    address: IpAddr,
    socket: Arc<GroupSocket>,
    /// What its events say.
    number: u64,
}

/// Why a queue pair was not attached.
#[derive(Debug)]
pub(crate) enum AttachError {
    /// The group has as many members as it can, or there are as many groups.
    Full,
    /// The system does not let the device hear the group.
    System(io::Error),
}

impl Groups {
    fn of_address(&self, address: IpAddr) -> impl Iterator<Item = &Arc<QueuePair>> {
        self.members.iter().filter(move |(g, _)| address_of_gid(*g) == address).map(|(_, qp)| qp)
    }
}

impl Multicast {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Multicast { groups: RwLock::default(), epoll, any_socket: AtomicBool::new(false) })
    }

    fn read(&self) -> RwLockReadGuard<'_, Groups> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Groups> {
        self.groups.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable while a group's socket has anything.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Attaches a queue pair to a group; no more than once.
    pub(crate) fn attach(
        &self,
        device: &Device,
        group: [u8; 16],
        qp: &Arc<QueuePair>,
    ) -> Result<(), AttachError> {
        let mut groups = self.write();
        let address = address_of_gid(group);
        if groups.of_address(address).any(|member| Arc::ptr_eq(member, qp)) {
            return Ok(());
        }
        if groups.of_address(address).count() >= MAX_MEMBERS {
            return Err(AttachError::Full);
        }
        let is_heard = groups.joined.iter().any(|joined| joined.address == address);
        if !is_heard && address.is_ipv4() == device.address.is_ipv4() {
            if groups.joined.len() >= MAX_GROUPS {
                return Err(AttachError::Full);
            }
            let number = groups.next;
            let socket = GroupSocket::join(address, device.address, device.interface_index)
                .and_then(|socket| {
                    let data = epoll::EventData::new_u64(number);
                    epoll::add(&self.epoll, socket.as_fd(), data, epoll::EventFlags::IN)?;
                    Ok(Arc::new(socket))
                })
                .map_err(AttachError::System)?;
            groups.next += 1;
            groups.joined.push(Joined { address, socket, number });
            self.any_socket.store(true, Ordering::Relaxed);
        }
        groups.members.push((group, Arc::clone(qp)));
        Ok(())
    }

    /// False if it is not attached. With the last member of a group its socket goes.
    pub(crate) fn detach(&self, group: [u8; 16], qp: &Arc<QueuePair>) -> bool {
        let mut groups = self.write();
        let before = groups.members.len();
        let address = address_of_gid(group);
        groups.members.retain(|(g, member)| address_of_gid(*g) != address || !Arc::ptr_eq(member, qp));
        if groups.of_address(address).next().is_none() {
            groups.joined.retain(|joined| joined.address != address);
            self.any_socket.store(!groups.joined.is_empty(), Ordering::Relaxed);
        }
        groups.members.len() < before
    }

    /// Detaches a queue pair from all its groups.
    pub(crate) fn detach_all(&self, qp: &Arc<QueuePair>) {
        let is_member = |(group, member): &([u8; 16], Arc<_>)| Arc::ptr_eq(member, qp).then_some(*group);
        let groups: Vec<_> = self.read().members.iter().filter_map(is_member).collect();
        for group in groups {
            self.detach(group, qp);
        }
    }

    /// Whether the queue pair is attached to any group.
    pub(crate) fn has(&self, qp: &Arc<QueuePair>) -> bool {
        self.read().members.iter().any(|(_, member)| Arc::ptr_eq(member, qp))
    }

    /// The members of a group, or of the one that an IP address stands for: GIDs with one address are one group.
    pub(super) fn members(&self, group: Option<[u8; 16]>, address: IpAddr) -> Vec<Arc<QueuePair>> {
        self.read().of_address(group.map_or(address, address_of_gid)).cloned().collect()
    }

    /// Some groups whose sockets have something.
    fn ready(&self) -> Vec<(IpAddr, Arc<GroupSocket>)> {
        let none = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut events = [none; 8];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = epoll::wait(&self.epoll, &mut events, Some(&at_once)).unwrap_or(0);
        let groups = self.read();
        let of = |event: &epoll::Event| {
            let joined = groups.joined.iter().find(|joined| joined.number == event.data.u64())?;
            Some((joined.address, Arc::clone(&joined.socket)))
        };
        events[..count].iter().filter_map(of).collect()
    }
}

impl Device {
    /// Takes what the groups' sockets have; for the background thread.
    pub(super) fn serve_groups(&self, scratch: &mut Scratch) -> bool {
        /// Datagrams of one group before the others have their turn.
        const PER_GROUP: usize = 64;
        if !self.multicast.any_socket.load(Ordering::Relaxed) {
            return false;
        }
        let mut worked = false;
        // Longer ones are none of ours, and their ICRC shows it.
        let mut buffer = [0; MAX_PACKET_LEN + 1];
        for (group, socket) in self.multicast.ready() {
            for _ in 0..PER_GROUP {
                let Some((from, bytes)) = socket.receive(&mut buffer) else { break };
                self.take_group_datagram(group, from, bytes, scratch);
                worked = true;
            }
        }
        worked
    }

    fn take_group_datagram(&self, group: IpAddr, from: SocketAddr, bytes: &[u8], scratch: &mut Scratch) {
        // The device's own come back too; its members have them already.
        if from.ip() == self.address {
            return;
        }
        self.counters.count(DeviceCounter::DatagramsReceived);
        let to = SocketAddr::new(group, ROCE_V2_PORT);
        let envelope = Envelope { from, to, traffic_class: 0, identification: 0 };
        let Some(packet) = self.check(&envelope, Origin::Wire, bytes, |transport| envelope.icrc(transport))
        else {
            return;
        };
        if packet.bth.dest_qp() != MULTICAST {
            return self.counters.count(DeviceCounter::DropNoQueuePair);
        }
        self.hand_to_members(&envelope, None, &packet, bytes.len(), self.now(), scratch);
    }
}
