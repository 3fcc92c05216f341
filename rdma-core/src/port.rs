//! Ports, and the GIDs and keys of their tables.

use std::ffi::CStr;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use verbs_sys::{ibv_gid, ibv_gid_entry, ibv_gid_type, ibv_mtu, ibv_port_attr, ibv_port_state, inline};

use crate::Error;
use crate::context::Context;

/// A global identifier: an IPv6 address, or an IPv4 address mapped into one (IBTA vol. 1, 4.1.1; on
/// RoCEv2, annex A17.4.5.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The GID as an IPv6 address.
    #[must_use]
    pub fn ipv6(self) -> Ipv6Addr {
        Ipv6Addr::from(self.0)
    }

    /// The IPv4 address it maps, if it does.
    #[must_use]
    pub fn ipv4(self) -> Option<Ipv4Addr> {
        self.ipv6().to_ipv4_mapped()
    }

    /// Whether it is all zeroes: an empty entry of the table.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 == [0; 16]
    }

    pub(crate) fn raw(self) -> ibv_gid {
        ibv_gid { raw: self.0 }
    }

    pub(crate) fn from_raw(gid: ibv_gid) -> Gid {
        // SAFETY: every member of the union is plain bytes or integers.
        Gid(unsafe { gid.raw })
    }
}

impl From<Ipv4Addr> for Gid {
    fn from(address: Ipv4Addr) -> Gid {
        Gid(address.to_ipv6_mapped().octets())
    }
}

impl From<Ipv6Addr> for Gid {
    fn from(address: Ipv6Addr) -> Gid {
        Gid(address.octets())
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ipv6().fmt(f)
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({self})")
    }
}

/// The network that a GID belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GidType {
    /// InfiniBand.
    InfiniBand,
    /// RoCE v1: Ethernet frames of their own.
    RoceV1,
    /// RoCE v2: UDP port 4791.
    RoceV2,
    /// A value that this library does not know.
    Unknown(u32),
}

impl GidType {
    fn from_raw(raw: u32) -> GidType {
        match ibv_gid_type(raw) {
            ibv_gid_type::IBV_GID_TYPE_IB => GidType::InfiniBand,
            ibv_gid_type::IBV_GID_TYPE_ROCE_V1 => GidType::RoceV1,
            ibv_gid_type::IBV_GID_TYPE_ROCE_V2 => GidType::RoceV2,
            _ => GidType::Unknown(raw),
        }
    }
}

impl fmt::Display for GidType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GidType::InfiniBand => f.write_str("InfiniBand"),
            GidType::RoceV1 => f.write_str("RoCE v1"),
            GidType::RoceV2 => f.write_str("RoCE v2"),
            GidType::Unknown(raw) => write!(f, "GID type {raw}"),
        }
    }
}

/// An entry of a port's GID table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GidEntry {
    /// The GID.
    pub gid: Gid,
    /// Its index in the table.
    pub index: u32,
    /// Its network.
    pub gid_type: GidType,
    /// The name of the network interface behind it, if there is one.
    pub interface: Option<String>,
}

/// A path MTU.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mtu(u32);

impl Mtu {
    /// 256 bytes.
    pub const B256: Mtu = Mtu(ibv_mtu::IBV_MTU_256.0);
    /// 512 bytes.
    pub const B512: Mtu = Mtu(ibv_mtu::IBV_MTU_512.0);
    /// 1024 bytes.
    pub const B1024: Mtu = Mtu(ibv_mtu::IBV_MTU_1024.0);
    /// 2048 bytes.
    pub const B2048: Mtu = Mtu(ibv_mtu::IBV_MTU_2048.0);
    /// 4096 bytes.
    pub const B4096: Mtu = Mtu(ibv_mtu::IBV_MTU_4096.0);

    /// The size in bytes; 0 for a code that this library does not know.
    #[must_use]
    pub fn bytes(self) -> u32 {
        if (1..=5).contains(&self.0) { 128 << self.0 } else { 0 }
    }

    /// The MTU of exactly `bytes`.
    #[must_use]
    pub fn from_bytes(bytes: u32) -> Option<Mtu> {
        (1..=5).map(Mtu).find(|mtu| mtu.bytes() == bytes)
    }

    pub(crate) fn from_raw(raw: ibv_mtu) -> Mtu {
        Mtu(raw.0)
    }

    pub(crate) fn raw(self) -> ibv_mtu {
        ibv_mtu(self.0)
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().fmt(f)
    }
}

impl fmt::Debug for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mtu({} bytes)", self.bytes())
    }
}

/// The logical state of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PortState {
    /// No change of state.
    Nop,
    /// The link is down.
    Down,
    /// The link is up; a subnet manager has not configured it.
    Init,
    /// Configured, not yet active.
    Armed,
    /// Ready for traffic.
    Active,
    /// Active, with the link temporarily down.
    ActiveDefer,
    /// A value that this library does not know.
    Unknown(u32),
}

/// The physical state of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PhysicalState {
    /// Sleep.
    Sleep,
    /// Polling for a link.
    Polling,
    /// Disabled.
    Disabled,
    /// Training.
    Training,
    /// The link is up.
    LinkUp,
    /// Recovering from a link error.
    LinkErrorRecovery,
    /// Under test.
    PhyTest,
    /// A value that this library does not know.
    Unknown(u8),
}

/// What a port is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LinkLayer {
    /// Not said; InfiniBand, by the age of drivers that say so.
    Unspecified,
    /// InfiniBand: addresses are LIDs.
    InfiniBand,
    /// Ethernet (RoCE): addresses are GIDs.
    Ethernet,
    /// A value that this library does not know.
    Unknown(u8),
}

/// A port's attributes (`man ibv_query_port`).
#[derive(Debug, Clone, Copy)]
pub struct PortAttributes {
    /// Logical state.
    pub state: PortState,
    /// Physical state.
    pub physical_state: PhysicalState,
    /// Largest MTU.
    pub max_mtu: Mtu,
    /// MTU in use.
    pub active_mtu: Mtu,
    /// Link layer.
    pub link_layer: LinkLayer,
    /// Base local identifier (InfiniBand).
    pub lid: u16,
    /// Low bits of the LID that are the port's own.
    pub lid_mask_count: u8,
    /// LID of the subnet manager.
    pub sm_lid: u16,
    /// Service level of the subnet manager.
    pub sm_service_level: u8,
    /// Length of the GID table.
    pub gid_table_len: u32,
    /// Length of the P_Key table.
    pub pkey_table_len: u16,
    /// Longest message in bytes.
    pub max_message: u32,
    /// Capabilities (`enum ibv_port_cap_flags`).
    pub capabilities: u32,
    /// Rate in Mbit/s: width times speed; 0 when a code is unknown.
    pub rate_mbps: u32,
}

impl PortAttributes {
    fn from_raw(raw: &ibv_port_attr) -> PortAttributes {
        let state = match raw.state {
            ibv_port_state::IBV_PORT_NOP => PortState::Nop,
            ibv_port_state::IBV_PORT_DOWN => PortState::Down,
            ibv_port_state::IBV_PORT_INIT => PortState::Init,
            ibv_port_state::IBV_PORT_ARMED => PortState::Armed,
            ibv_port_state::IBV_PORT_ACTIVE => PortState::Active,
            ibv_port_state::IBV_PORT_ACTIVE_DEFER => PortState::ActiveDefer,
            other => PortState::Unknown(other.0),
        };
        let physical_state = match raw.phys_state {
            1 => PhysicalState::Sleep,
            2 => PhysicalState::Polling,
            3 => PhysicalState::Disabled,
            4 => PhysicalState::Training,
            5 => PhysicalState::LinkUp,
            6 => PhysicalState::LinkErrorRecovery,
            7 => PhysicalState::PhyTest,
            other => PhysicalState::Unknown(other),
        };
        let link_layer = match raw.link_layer {
            0 => LinkLayer::Unspecified,
            1 => LinkLayer::InfiniBand,
            2 => LinkLayer::Ethernet,
            other => LinkLayer::Unknown(other),
        };
        PortAttributes {
            state,
            physical_state,
            max_mtu: Mtu::from_raw(raw.max_mtu),
            active_mtu: Mtu::from_raw(raw.active_mtu),
            link_layer,
            lid: raw.lid,
            lid_mask_count: raw.lmc,
            sm_lid: raw.sm_lid,
            sm_service_level: raw.sm_sl,
            gid_table_len: u32::try_from(raw.gid_tbl_len).unwrap_or(0),
            pkey_table_len: raw.pkey_tbl_len,
            max_message: raw.max_msg_sz,
            capabilities: raw.port_cap_flags,
            rate_mbps: rate(raw.active_width, raw.active_speed),
        }
    }

    /// Whether addresses need a GID: on Ethernet always.
    #[must_use]
    pub fn needs_gid(&self) -> bool {
        self.link_layer == LinkLayer::Ethernet
    }
}

/// Lanes times the speed of one (IBTA vol. 1, 14.2.5.6, PortInfo LinkWidthActive, LinkSpeedActive).
fn rate(width: u8, speed: u8) -> u32 {
    let lanes = match width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => return 0,
    };
    let mbps = match speed {
        1 => 2_500,
        2 => 5_000,
        4 | 8 => 10_000,
        16 => 14_063,
        32 => 25_781,
        64 => 50_000,
        128 => 100_000,
        _ => return 0,
    };
    lanes * mbps
}

/// The GID chosen for a port, and why.
#[derive(Debug, Clone)]
pub struct GidChoice {
    /// The entry.
    pub entry: GidEntry,
    /// Why this one, in words.
    pub reason: String,
}

/// How little an entry is wanted: the smaller the better.
fn rank(entry: &GidEntry) -> u32 {
    let ip = entry.gid.ipv6();
    let link_local = ip.is_unicast_link_local();
    match (entry.gid_type, entry.gid.ipv4().is_some()) {
        (GidType::RoceV2, true) => 0,
        (GidType::RoceV2, false) if !link_local => 1,
        (GidType::RoceV2, false) => 2,
        (GidType::InfiniBand, _) => 3,
        (GidType::RoceV1, _) => 4,
        (GidType::Unknown(_), _) => 5,
    }
}

/// Chooses from a port's table: RoCE v2 over IPv4 first, then over routable IPv6, then link-local, then
/// what is not RoCE v2; the lowest index among equals.
fn choose(entries: Vec<GidEntry>) -> Option<GidChoice> {
    let seen = entries.len();
    let entry = entries.into_iter().min_by_key(|entry| (rank(entry), entry.index))?;
    let why = match rank(&entry) {
        0 => "the first RoCE v2 GID that maps an IPv4 address",
        1 => "the first routable RoCE v2 GID; none maps an IPv4 address",
        2 => "only link-local RoCE v2 GIDs exist: peers must be on the same link",
        3 => "the port is InfiniBand",
        4 => "only RoCE v1 GIDs exist: traffic is not routed, and peers must use RoCE v1 too",
        _ => "the types of the GIDs are not known",
    };
    let reason = format!(
        "GID index {} ({}, {}{}) of {seen}: {why}",
        entry.index,
        entry.gid,
        entry.gid_type,
        entry.interface.as_ref().map(|name| format!(", {name}")).unwrap_or_default(),
    );
    Some(GidChoice { entry, reason })
}

impl Context {
    /// A port's attributes (`man ibv_query_port`). Ports count from 1.
    ///
    /// # Errors
    ///
    /// What `ibv_query_port` says.
    pub fn port(&self, port: u8) -> Result<PortAttributes, Error> {
        let mut raw = ibv_port_attr::default();
        let context = self.inner.ptr.as_ptr();
        // SAFETY: the context is live (S-1), the structure zeroed and of the size that is passed.
        let code = match unsafe { inline::ibv_query_port_ex(context, port, &raw mut raw) } {
            Some(code) => code,
            // SAFETY: as above; the exported function fills a prefix of the structure.
            None => unsafe { (self.inner.verbs.ibv_query_port)(context, port, (&raw mut raw).cast()) },
        };
        Error::check("ibv_query_port", code)?;
        Ok(PortAttributes::from_raw(&raw))
    }

    /// The GID at `index` (`man ibv_query_gid`).
    ///
    /// # Errors
    ///
    /// What `ibv_query_gid` says.
    pub fn gid(&self, port: u8, index: u32) -> Result<Gid, Error> {
        let mut raw = Gid([0; 16]).raw();
        let index = i32::try_from(index).unwrap_or(i32::MAX);
        // SAFETY: the context is live (S-1), the output valid for writes.
        let code =
            unsafe { (self.inner.verbs.ibv_query_gid)(self.inner.ptr.as_ptr(), port, index, &raw mut raw) };
        Error::check("ibv_query_gid", code)?;
        Ok(Gid::from_raw(raw))
    }

    /// The filled entries of a port's GID table, with type and interface (`man ibv_query_gid_ex`).
    ///
    /// # Errors
    ///
    /// What the verbs say. A library without `ibv_query_gid_ex` gives types guessed from the link layer.
    pub fn gids(&self, port: u8) -> Result<Vec<GidEntry>, Error> {
        let attributes = self.port(port)?;
        let mut entries = Vec::new();
        for index in 0..attributes.gid_table_len {
            let entry = match self.inner.verbs.ibv_query_gid_ex {
                Some(query) => {
                    // SAFETY: integers and a union of them: all zeroes are a value.
                    let mut raw: ibv_gid_entry = unsafe { std::mem::zeroed() };
                    let size = size_of::<ibv_gid_entry>();
                    // SAFETY: the context is live (S-1), the output has the size that is passed.
                    let code = unsafe {
                        query(self.inner.ptr.as_ptr(), u32::from(port), index, &raw mut raw, 0, size)
                    };
                    match code {
                        0 => {}
                        libc::ENODATA | libc::ENOENT => continue,
                        code => return Err(Error::verb("ibv_query_gid_ex", crate::error::from_return(code))),
                    }
                    GidEntry {
                        gid: Gid::from_raw(raw.gid),
                        index,
                        gid_type: GidType::from_raw(raw.gid_type),
                        interface: interface(raw.ndev_ifindex),
                    }
                }
                None => {
                    let gid_type = if attributes.needs_gid() { GidType::RoceV2 } else { GidType::InfiniBand };
                    GidEntry { gid: self.gid(port, index)?, index, gid_type, interface: None }
                }
            };
            if !entry.gid.is_zero() {
                entries.push(entry);
            }
        }
        Ok(entries)
    }

    /// The GID to use on a port when nobody says which, and why: RoCE v2 over IPv4 first.
    ///
    /// # Errors
    ///
    /// What the verbs say, and [`Error::NoDevice`] when the port has no GID.
    pub fn choose_gid(&self, port: u8) -> Result<GidChoice, Error> {
        choose(self.gids(port)?).ok_or_else(|| Error::NoDevice {
            reason: format!(
                "port {port} of {} has no GID: its network interface has no address, or is down",
                self.name()
            ),
        })
    }

    /// The partition key at `index` (`man ibv_query_pkey`), in host byte order.
    ///
    /// # Errors
    ///
    /// What `ibv_query_pkey` says.
    pub fn pkey(&self, port: u8, index: u16) -> Result<u16, Error> {
        let mut raw = 0;
        // SAFETY: the context is live (S-1), the output valid for writes.
        let code = unsafe {
            (self.inner.verbs.ibv_query_pkey)(self.inner.ptr.as_ptr(), port, i32::from(index), &raw mut raw)
        };
        Error::check("ibv_query_pkey", code)?;
        Ok(u16::from_be(raw))
    }
}

/// The name of a network interface.
fn interface(index: u32) -> Option<String> {
    if index == 0 {
        return None;
    }
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that the function needs.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr()) };
    if found.is_null() {
        return None;
    }
    // SAFETY: the function wrote a terminated string into the buffer.
    Some(unsafe { CStr::from_ptr(found) }.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u32, gid: &str, gid_type: GidType) -> GidEntry {
        GidEntry { gid: Gid::from(gid.parse::<Ipv6Addr>().unwrap()), index, gid_type, interface: None }
    }

    #[test]
    fn ipv4_over_roce_v2_comes_first() {
        let table = vec![
            entry(0, "fe80::1", GidType::RoceV1),
            entry(1, "fe80::1", GidType::RoceV2),
            entry(2, "::ffff:10.0.0.1", GidType::RoceV1),
            entry(3, "::ffff:10.0.0.1", GidType::RoceV2),
            entry(4, "2001:db8::1", GidType::RoceV2),
        ];
        let choice = choose(table.clone()).unwrap();
        assert_eq!(choice.entry.index, 3);
        assert!(choice.reason.contains("IPv4"), "{}", choice.reason);
        let without = table.into_iter().filter(|e| e.index != 3).collect();
        assert_eq!(choose(without).unwrap().entry.index, 4);
    }

    #[test]
    fn link_local_and_roce_v1_are_last_resorts_that_say_so() {
        let choice = choose(vec![entry(0, "fe80::1", GidType::RoceV1), entry(1, "fe80::1", GidType::RoceV2)]);
        assert!(choice.unwrap().reason.contains("link-local"));
        let choice = choose(vec![entry(0, "fe80::1", GidType::RoceV1)]);
        assert!(choice.unwrap().reason.contains("RoCE v1"));
        assert!(choose(Vec::new()).is_none());
    }

    #[test]
    fn mtu_codes() {
        assert_eq!(Mtu::B1024.bytes(), 1024);
        assert_eq!(Mtu::from_bytes(4096), Some(Mtu::B4096));
        assert_eq!(Mtu::from_bytes(1500), None);
        assert_eq!(Mtu::from_raw(ibv_mtu(77)).bytes(), 0);
    }
}
