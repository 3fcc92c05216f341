//! Devices: what there is, which one to take, what it can do.

use std::ffi::CStr;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use verbs_sys::{
    Verbs, ibv_atomic_cap, ibv_device, ibv_device_attr, ibv_device_attr_ex, ibv_odp_caps, inline,
};

use crate::Error;
use crate::context::{Context, ContextInner};
use crate::port::PortState;

/// Who provides a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Provider {
    /// The system's `libibverbs.so.1`: hardware, or the kernel's soft devices.
    System,
    /// The built-in device in user space.
    Soft,
    /// A device made for tests.
    Test,
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Provider::System => "libibverbs",
            Provider::Soft => "built in",
            Provider::Test => "for tests",
        })
    }
}

/// A list of `ibv_device`, freed with the last device of it.
struct List {
    verbs: &'static Verbs,
    ptr: *mut *mut ibv_device,
}

// SAFETY: the list is immutable until it is freed, once.
unsafe impl Send for List {}
// SAFETY: as above.
unsafe impl Sync for List {}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: from `ibv_get_device_list`, freed once; devices of it hold an Arc.
        unsafe { (self.verbs.ibv_free_device_list)(self.ptr) };
    }
}

/// An RDMA device that can be opened.
#[derive(Clone)]
pub struct Device {
    list: Arc<List>,
    ptr: NonNull<ibv_device>,
    name: String,
    provider: Provider,
}

// SAFETY: `ptr` is of the list, which is Send and lives as long.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// A device chosen, and why.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The device.
    pub device: Device,
    /// Why this one, in words, with what was passed over; to be read after the device's name.
    pub reason: String,
}

impl Device {
    /// All devices: those that libibverbs lists, then the built-in one. A missing libibverbs is no
    /// error; see [`Device::list_with_notes`] for why something is not in the list.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] when there is none at all.
    pub fn list() -> Result<Vec<Device>, Error> {
        let (devices, notes) = Device::list_with_notes();
        if devices.is_empty() {
            return Err(Error::NoDevice { reason: notes.join("; ") });
        }
        Ok(devices)
    }

    /// As [`list`](Device::list), with one sentence for each provider that has no devices.
    #[must_use]
    pub fn list_with_notes() -> (Vec<Device>, Vec<String>) {
        let mut devices = Vec::new();
        let mut notes = Vec::new();
        match Verbs::load() {
            Ok(verbs) => match Device::of(verbs, Provider::System) {
                Ok(found) if found.is_empty() => notes.push("libibverbs lists no devices".to_owned()),
                Ok(found) => devices.extend(found),
                Err(error) => notes.push(unlisted(&error)),
            },
            Err(error) => notes.push(error.to_string()),
        }
        #[cfg(feature = "soft")]
        match Device::of(rdma_soft::verbs(), Provider::Soft) {
            Ok(found) => devices.extend(found),
            Err(error) => notes.push(format!("the built-in device cannot be listed: {error}")),
        }
        (devices, notes)
    }

    /// The devices of one provider.
    pub(crate) fn of(verbs: &'static Verbs, provider: Provider) -> Result<Vec<Device>, Error> {
        let mut count = 0;
        // SAFETY: `count` is valid for writes.
        let ptr = unsafe { (verbs.ibv_get_device_list)(&raw mut count) };
        if ptr.is_null() {
            return Err(Error::last("ibv_get_device_list"));
        }
        let list = Arc::new(List { verbs, ptr });
        let mut devices = Vec::new();
        for i in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the list has `count` entries.
            let entry = unsafe { ptr.add(i) };
            // SAFETY: inside the list.
            let Some(ptr) = NonNull::new(unsafe { *entry }) else { break };
            // SAFETY: a device of the list.
            let name = unsafe { (verbs.ibv_get_device_name)(ptr.as_ptr()) };
            if name.is_null() {
                continue;
            }
            // SAFETY: a terminated string inside the device.
            let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
            devices.push(Device { list: Arc::clone(&list), ptr, name, provider });
        }
        Ok(devices)
    }

    /// The device named `name`.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownDevice`], which lists those that exist.
    pub fn named(name: &str) -> Result<Device, Error> {
        let (devices, _) = Device::list_with_notes();
        let mut available = Vec::new();
        for device in devices {
            if device.name == name {
                return Ok(device);
            }
            available.push(device.name);
        }
        Err(Error::UnknownDevice { name: name.to_owned(), available })
    }

    /// The device to use when nobody says which: the first of libibverbs with an ACTIVE port, else the
    /// built-in one.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`], with what was looked at and why it would not do.
    pub fn choose() -> Result<Choice, Error> {
        let (devices, mut notes) = Device::list_with_notes();
        for device in devices {
            if device.provider == Provider::Soft {
                let reason = match notes.is_empty() {
                    true => "the built-in device".to_owned(),
                    false => format!("the built-in device, because {}", notes.join("; ")),
                };
                return Ok(Choice { device, reason });
            }
            match device.active_port() {
                Ok(Some(port)) => {
                    let mut reason = format!("port {port} is ACTIVE");
                    if !notes.is_empty() {
                        reason = format!("{reason} ({})", notes.join("; "));
                    }
                    return Ok(Choice { device, reason });
                }
                Ok(None) => notes.push(format!("{} has no ACTIVE port", device.name)),
                Err(error) => notes.push(format!("{} cannot be used: {error}", device.name)),
            }
        }
        Err(Error::NoDevice { reason: notes.join("; ") })
    }

    /// The named device, or the one to use when nobody says which.
    ///
    /// # Errors
    ///
    /// As [`named`](Device::named) and [`choose`](Device::choose).
    pub fn named_or_chosen(name: Option<&str>) -> Result<Choice, Error> {
        match name {
            Some(name) => {
                let device = Device::named(name)?;
                Ok(Choice { reason: "asked for by name".to_owned(), device })
            }
            None => Device::choose(),
        }
    }

    /// The first ACTIVE port.
    fn active_port(&self) -> Result<Option<u8>, Error> {
        let context = self.open()?;
        for port in 1..=context.attributes()?.ports {
            if context.port(port)?.state == PortState::Active {
                return Ok(Some(port));
            }
        }
        Ok(None)
    }

    /// A device that completes every work request at once: shows what the library itself costs.
    ///
    /// # Errors
    ///
    /// None in practice: the device is part of the crate.
    #[cfg(feature = "test-providers")]
    pub fn null() -> Result<Device, Error> {
        Device::first(verbs_sys::null::verbs())
    }

    /// The misbehaving device of this name; see `verbs_sys::evil`.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownDevice`].
    #[cfg(feature = "test-providers")]
    pub fn evil(name: &str) -> Result<Device, Error> {
        Device::among(verbs_sys::evil::verbs(), name)
    }

    /// As [`evil`](Device::evil), behind a table without optional functions, as an old library has it.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownDevice`].
    #[cfg(feature = "test-providers")]
    pub fn evil_of_old(name: &str) -> Result<Device, Error> {
        Device::among(verbs_sys::evil::old_verbs(), name)
    }

    #[cfg(feature = "test-providers")]
    fn first(verbs: &'static Verbs) -> Result<Device, Error> {
        let first = Device::of(verbs, Provider::Test)?.into_iter().next();
        first.ok_or_else(|| Error::NoDevice { reason: "the test provider lists none".to_owned() })
    }

    #[cfg(feature = "test-providers")]
    fn among(verbs: &'static Verbs, name: &str) -> Result<Device, Error> {
        let found = Device::of(verbs, Provider::Test)?.into_iter().find(|device| device.name == name);
        found.ok_or_else(|| Error::UnknownDevice { name: name.to_owned(), available: Vec::new() })
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who provides it.
    #[must_use]
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// The node's globally unique identifier.
    #[must_use]
    pub fn guid(&self) -> u64 {
        // SAFETY: the device is of a live list.
        u64::from_be(unsafe { (self.list.verbs.ibv_get_device_guid)(self.ptr.as_ptr()) })
    }

    /// Opens the device (`man ibv_open_device`).
    ///
    /// # Errors
    ///
    /// What `ibv_open_device` says; of the built-in device also which address or variable it is about.
    pub fn open(&self) -> Result<Context, Error> {
        // SAFETY: the device is of a live list.
        let ptr = unsafe { (self.list.verbs.ibv_open_device)(self.ptr.as_ptr()) };
        let ptr = NonNull::new(ptr).ok_or_else(|| self.explained(Error::last("ibv_open_device")))?;
        // SAFETY: just opened with these verbs.
        let inner = unsafe { ContextInner::new(self.list.verbs, ptr, self.name.clone()) };
        Ok(Context { inner })
    }

    /// Why it was not opened, in the device's own words where it has some.
    fn explained(&self, error: Error) -> Error {
        match (error, self.reason()) {
            (Error::Verb { verb, source, .. }, Some(reason)) => {
                Error::Verb { verb, source, advice: format!("; {reason}") }
            }
            (error, _) => error,
        }
    }

    /// The built-in device knows more than an errno can say: the address, the variable, the value.
    #[cfg(feature = "soft")]
    fn reason(&self) -> Option<String> {
        (self.provider == Provider::Soft).then(rdma_soft::last_error)?.map(|reason| reason.to_string())
    }

    #[cfg(not(feature = "soft"))]
    fn reason(&self) -> Option<String> {
        None
    }
}

/// Why libibverbs lists nothing.
fn unlisted(error: &Error) -> String {
    match error {
        // What the list fails with where the kernel has no /sys/class/infiniband_verbs.
        Error::Unsupported { .. } => "this kernel has no RDMA devices (ENOSYS)".to_owned(),
        error => format!("libibverbs cannot list devices: {error}"),
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name)
            .field("provider", &self.provider)
            .finish_non_exhaustive()
    }
}

/// How far atomic operations of a device are atomic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AtomicCapability {
    /// It has none.
    None,
    /// Among operations of this device.
    Device,
    /// Also against the CPU and other devices.
    Global,
    /// A value that this library does not know.
    Unknown(u32),
}

/// On-demand paging per transport (`man ibv_query_device_ex`).
#[derive(Debug, Clone, Copy, Default)]
pub struct OdpCapabilities {
    /// General (`enum ibv_odp_general_caps`).
    pub general: u64,
    /// For RC (`enum ibv_odp_transport_cap_bits`).
    pub rc: u32,
    /// For UC.
    pub uc: u32,
    /// For UD.
    pub ud: u32,
}

/// What a device can do (`man ibv_query_device`, `man ibv_query_device_ex`).
#[derive(Debug, Clone)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are the manual page's, without their prefix")]
pub struct DeviceAttributes {
    /// Firmware version.
    pub firmware: String,
    /// GUID of the node, in host byte order.
    pub node_guid: u64,
    /// GUID of the system image, in host byte order.
    pub system_guid: u64,
    pub vendor_id: u32,
    pub vendor_part_id: u32,
    pub hardware_version: u32,
    /// Physical ports, counted from 1.
    pub ports: u8,
    pub max_mr_size: u64,
    /// Page sizes the device can use, as a bit mask.
    pub page_sizes: u64,
    pub max_qp: u32,
    /// Deepest work queue.
    pub max_qp_wr: u32,
    /// Capabilities (`enum ibv_device_cap_flags`).
    pub capabilities: u64,
    pub max_sge: u32,
    pub max_sge_read: u32,
    pub max_cq: u32,
    /// Deepest completion queue.
    pub max_cqe: u32,
    pub max_mr: u32,
    pub max_pd: u32,
    /// RDMA reads and atomics in flight towards a queue pair.
    pub max_qp_rd_atom: u8,
    /// RDMA reads and atomics in flight from a queue pair.
    pub max_qp_init_rd_atom: u8,
    pub atomic_capability: AtomicCapability,
    pub max_mw: u32,
    pub max_multicast_groups: u32,
    pub max_multicast_attach: u32,
    pub max_ah: u32,
    pub max_srq: u32,
    pub max_srq_wr: u32,
    pub max_srq_sge: u32,
    pub max_pkeys: u16,
    pub local_ack_delay: u8,
    /// Bits of a completion timestamp; 0 where there are none, or where the provider has no extended query.
    pub timestamp_mask: u64,
    /// Frequency of the device's clock in kHz; 0 when unknown.
    pub clock_khz: u64,
    pub odp: OdpCapabilities,
    /// Largest count that completion moderation takes; 0 where there is none.
    pub max_moderation_count: u16,
    /// Longest period in microseconds that completion moderation takes.
    pub max_moderation_period: u16,
}

impl DeviceAttributes {
    pub(crate) fn query(context: &ContextInner) -> Result<DeviceAttributes, Error> {
        let mut extended = ibv_device_attr_ex::default();
        // SAFETY: the context is live (S-1); the structure is zeroed, of the size that is passed.
        let code =
            unsafe { inline::ibv_query_device_ex(context.ptr.as_ptr(), std::ptr::null(), &raw mut extended) };
        if code != 0 {
            // Providers without the extended query: the rest stays zero.
            extended = ibv_device_attr_ex::default();
            // SAFETY: as above.
            let code = unsafe {
                (context.verbs.ibv_query_device)(context.ptr.as_ptr(), &raw mut extended.orig_attr)
            };
            Error::check("ibv_query_device", code)?;
        }
        Ok(DeviceAttributes::from_raw(&extended))
    }

    fn from_raw(raw: &ibv_device_attr_ex) -> DeviceAttributes {
        let attr: &ibv_device_attr = &raw.orig_attr;
        let count = |n: i32| u32::try_from(n).unwrap_or(0);
        let depth = |n: i32| u8::try_from(n.clamp(0, 255)).unwrap_or(0);
        let firmware: Vec<u8> =
            attr.fw_ver.iter().map(|&c| c.to_ne_bytes()[0]).take_while(|&c| c != 0).collect();
        let ibv_odp_caps { general_caps, per_transport_caps: odp } = raw.odp_caps;
        DeviceAttributes {
            firmware: String::from_utf8_lossy(&firmware).into_owned(),
            node_guid: u64::from_be(attr.node_guid),
            system_guid: u64::from_be(attr.sys_image_guid),
            vendor_id: attr.vendor_id,
            vendor_part_id: attr.vendor_part_id,
            hardware_version: attr.hw_ver,
            ports: attr.phys_port_cnt,
            max_mr_size: attr.max_mr_size,
            page_sizes: attr.page_size_cap,
            max_qp: count(attr.max_qp),
            max_qp_wr: count(attr.max_qp_wr),
            capabilities: u64::from(attr.device_cap_flags) | raw.device_cap_flags_ex,
            max_sge: count(attr.max_sge),
            max_sge_read: count(attr.max_sge_rd),
            max_cq: count(attr.max_cq),
            max_cqe: count(attr.max_cqe),
            max_mr: count(attr.max_mr),
            max_pd: count(attr.max_pd),
            max_qp_rd_atom: depth(attr.max_qp_rd_atom),
            max_qp_init_rd_atom: depth(attr.max_qp_init_rd_atom),
            atomic_capability: match attr.atomic_cap {
                ibv_atomic_cap::IBV_ATOMIC_NONE => AtomicCapability::None,
                ibv_atomic_cap::IBV_ATOMIC_HCA => AtomicCapability::Device,
                ibv_atomic_cap::IBV_ATOMIC_GLOB => AtomicCapability::Global,
                other => AtomicCapability::Unknown(other.0),
            },
            max_mw: count(attr.max_mw),
            max_multicast_groups: count(attr.max_mcast_grp),
            max_multicast_attach: count(attr.max_mcast_qp_attach),
            max_ah: count(attr.max_ah),
            max_srq: count(attr.max_srq),
            max_srq_wr: count(attr.max_srq_wr),
            max_srq_sge: count(attr.max_srq_sge),
            max_pkeys: attr.max_pkeys,
            local_ack_delay: attr.local_ca_ack_delay,
            timestamp_mask: raw.completion_timestamp_mask,
            clock_khz: raw.hca_core_clock,
            odp: OdpCapabilities {
                general: general_caps,
                rc: odp.rc_odp_caps,
                uc: odp.uc_odp_caps,
                ud: odp.ud_odp_caps,
            },
            max_moderation_count: raw.cq_mod_caps.max_cq_count,
            max_moderation_period: raw.cq_mod_caps.max_cq_period,
        }
    }
}
