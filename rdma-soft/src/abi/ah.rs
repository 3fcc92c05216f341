//! Address handles, and the addresses inside of queue pair attributes.

use std::ffi::c_int;
use std::ptr;

use verbs_sys::*;

use super::context::{Counted, context_data};
use super::domain::{DomainUse, domain};
use super::object::{Object, null, zeroed};
use super::query::PORT;
use crate::device::{Device, address_of_gid};
use crate::proto::Destination;

/// GID index of the address itself.
const ADDRESS_INDEX: u8 = 1;

/// Our part of an address handle.
pub(crate) struct AhData {
    pub(crate) destination: Destination,
    pub(crate) domain: DomainUse,
    _counted: Counted,
}

type Ah = Object<ibv_ah, AhData>;

/// # Safety
///
/// `ah` is a live address handle of this device.
pub(crate) unsafe fn data<'a>(ah: *mut ibv_ah) -> &'a AhData {
    // SAFETY: the caller's promise.
    unsafe { Ah::data(ah) }
}

/// Checks an address and gives the bytes of its GID. RoCE knows global addresses only.
pub(crate) fn check(device: &Device, attr: &ibv_ah_attr) -> Result<[u8; 16], c_int> {
    if attr.is_global == 0 || attr.port_num != PORT || device.gid(usize::from(attr.grh.sgid_index)).is_none()
    {
        return Err(libc::EINVAL);
    }
    // SAFETY: all views of a GID are plain bytes.
    let gid = unsafe { attr.grh.dgid.raw };
    let address = address_of_gid(gid);
    // A group whose IPv4 part is that of a single host is none.
    if gid[0] == 0xff && !address.is_multicast() {
        return Err(libc::EINVAL);
    }
    // A socket reaches addresses of its own family only; the errno is what a route that is missing gives.
    if address.is_ipv4() != device.address.is_ipv4() {
        return Err(libc::ENETUNREACH);
    }
    Ok(gid)
}

pub(crate) unsafe extern "C" fn create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah {
    // SAFETY: the caller passes a live protection domain.
    let domain = unsafe { domain(pd) };
    // SAFETY: and valid attributes.
    let attr = unsafe { &*attr };
    let gid = match check(&domain.device, attr) {
        Ok(gid) => gid,
        Err(errno) => return null(errno),
    };
    // SAFETY: a live protection domain's context is live.
    let context = unsafe { (*pd).context };
    // SAFETY: as above.
    let counted = Counted::new(unsafe { context_data(context) });
    let destination = Destination {
        gid,
        flow_label: attr.grh.flow_label,
        traffic_class: attr.grh.traffic_class,
        hop_limit: attr.grh.hop_limit,
        service_level: attr.sl,
        sgid_index: attr.grh.sgid_index,
        ..Destination::default()
    };
    let c = ibv_ah { context, pd, handle: 0 };
    Ah::allocate(c, AhData { destination, domain: DomainUse::new(&domain.domain), _counted: counted })
}

pub(crate) unsafe extern "C" fn destroy_ah(ah: *mut ibv_ah) -> c_int {
    // SAFETY: the caller passes a live handle and uses it no more; what was posted has a copy of it.
    drop(unsafe { Ah::free(ah) });
    0
}

/// `man ibv_init_ah_from_wc`: the way back to the sender of a datagram, from its route header.
pub(crate) unsafe extern "C" fn init_ah_from_wc(
    context: *mut ibv_context,
    port: u8,
    wc: *mut ibv_wc,
    grh: *mut ibv_grh,
    attr: *mut ibv_ah_attr,
) -> c_int {
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    // SAFETY: and a completion.
    let wc = unsafe { &*wc };
    if wc.wc_flags & ibv_wc_flags::IBV_WC_GRH.0 == 0 || grh.is_null() || port != PORT {
        return super::object::minus_one(libc::EINVAL);
    }
    // SAFETY: and the 40 bytes in front of the datagram, aligned or not.
    let header = unsafe { ptr::read_unaligned(grh.cast::<[u8; 40]>()) };
    let mut told: ibv_ah_attr = zeroed();
    told.is_global = 1;
    told.port_num = port;
    told.sl = wc.sl;
    told.grh.hop_limit = 0xff;
    let (source, destination) = addresses(&header, &mut told.grh.traffic_class);
    told.grh.dgid = ibv_gid { raw: source };
    let is_ours =
        |index: &u8| data.device.gid(usize::from(*index)).is_some_and(|gid| gid.octets() == destination);
    // A datagram to a multicast group is answered from the address itself.
    told.grh.sgid_index = (0..=ADDRESS_INDEX).find(is_ours).unwrap_or(ADDRESS_INDEX);
    // SAFETY: the caller passes a pointer that is valid for writes.
    unsafe { attr.write(told) };
    0
}

/// Source and destination GID of a route header: IPv6, or IPv4 in its last 20 bytes (annex A17.4.5.1).
fn addresses(header: &[u8; 40], traffic_class: &mut u8) -> ([u8; 16], [u8; 16]) {
    let (mut source, mut destination) = ([0; 16], [0; 16]);
    if header[0] >> 4 != 6 && header[20] >> 4 == 4 {
        *traffic_class = header[21];
        for (gid, address) in [(&mut source, &header[32..36]), (&mut destination, &header[36..40])] {
            gid[10..12].fill(0xff);
            gid[12..].copy_from_slice(address);
        }
    } else {
        *traffic_class = header[0] << 4 | header[1] >> 4;
        source.copy_from_slice(&header[8..24]);
        destination.copy_from_slice(&header[24..40]);
    }
    (source, destination)
}

pub(crate) unsafe extern "C" fn create_ah_from_wc(
    pd: *mut ibv_pd,
    wc: *mut ibv_wc,
    grh: *mut ibv_grh,
    port: u8,
) -> *mut ibv_ah {
    let mut attr: ibv_ah_attr = zeroed();
    // SAFETY: the caller passes a live protection domain.
    let context = unsafe { (*pd).context };
    // SAFETY: the caller's promise is the same.
    if unsafe { init_ah_from_wc(context, port, wc, grh, &raw mut attr) } != 0 {
        return ptr::null_mut();
    }
    // SAFETY: as above.
    unsafe { create_ah(pd, &raw mut attr) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_header_of_ipv4_gives_mapped_addresses() {
        let mut header = [0; 40];
        header[20] = 0x45;
        header[21] = 0x2a;
        header[32..].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        let mut class = 0;
        let (source, destination) = addresses(&header, &mut class);
        assert_eq!((source[10..].to_vec(), class), (vec![0xff, 0xff, 10, 0, 0, 1], 0x2a));
        assert_eq!(destination[12..], [10, 0, 0, 2]);
    }

    #[test]
    fn one_of_ipv6_gives_them_as_they_are() {
        let mut header = [0; 40];
        (header[0], header[1]) = (0x63, 0x40);
        header[8..24].fill(1);
        header[24..].fill(2);
        let mut class = 0;
        assert_eq!(addresses(&header, &mut class), ([1; 16], [2; 16]));
        assert_eq!(class, 0x34);
    }
}
