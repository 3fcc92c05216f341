//! Changes of a queue pair's state and attributes.

use std::ffi::c_int;
use std::net::IpAddr;

use verbs_sys::*;

use super::query::{MAX_RD_ATOMIC, PORT};
use super::{ah, qp};
use crate::device::address_of_gid;
use crate::proto::{Attributes, PathMtu, QpAccess, State};
use crate::wire::{DEFAULT_PKEY, Psn, RnrTimer, Transport};

type Mask = ibv_qp_attr_mask;

const STATE: u32 = Mask::IBV_QP_STATE.0;
const CUR: u32 = Mask::IBV_QP_CUR_STATE.0;
const SQD_EVENT: u32 = Mask::IBV_QP_EN_SQD_ASYNC_NOTIFY.0;
const ACCESS: u32 = Mask::IBV_QP_ACCESS_FLAGS.0;
const PKEY: u32 = Mask::IBV_QP_PKEY_INDEX.0;
const PORT_NUM: u32 = Mask::IBV_QP_PORT.0;
const QKEY: u32 = Mask::IBV_QP_QKEY.0;
const AV: u32 = Mask::IBV_QP_AV.0;
const MTU: u32 = Mask::IBV_QP_PATH_MTU.0;
const TIMEOUT: u32 = Mask::IBV_QP_TIMEOUT.0;
const RETRY: u32 = Mask::IBV_QP_RETRY_CNT.0;
const RNR_RETRY: u32 = Mask::IBV_QP_RNR_RETRY.0;
const RQ_PSN: u32 = Mask::IBV_QP_RQ_PSN.0;
const RD_ATOMIC: u32 = Mask::IBV_QP_MAX_QP_RD_ATOMIC.0;
const ALT: u32 = Mask::IBV_QP_ALT_PATH.0;
const RNR_TIMER: u32 = Mask::IBV_QP_MIN_RNR_TIMER.0;
const SQ_PSN: u32 = Mask::IBV_QP_SQ_PSN.0;
const DEST_RD_ATOMIC: u32 = Mask::IBV_QP_MAX_DEST_RD_ATOMIC.0;
const MIGRATION: u32 = Mask::IBV_QP_PATH_MIG_STATE.0;
const DEST: u32 = Mask::IBV_QP_DEST_QPN.0;

/// The attributes that a transition must and may have (clause 11.2.4.2, table 91), or `None` if there is no
/// such transition.
fn attributes_of(transport: Transport, from: State, to: State) -> Option<(u32, u32)> {
    use State::*;
    let (rc, uc) = (transport == Transport::Rc, transport == Transport::Uc);
    let connected = rc || uc;
    // By transport: datagram, unreliable, reliable connection.
    let of = |ud: u32, in_uc: u32, in_rc: u32| {
        if rc {
            in_rc
        } else if uc {
            in_uc
        } else {
            ud
        }
    };
    Some(match (from, to) {
        (_, Reset | Err) => (0, 0),
        (Reset, Init) => (PKEY | PORT_NUM | if connected { ACCESS } else { QKEY }, 0),
        (Init, Init) => (0, PKEY | PORT_NUM | if connected { ACCESS } else { QKEY }),
        (Init, Rtr) => {
            let path = AV | MTU | DEST | RQ_PSN;
            (of(0, path, path | DEST_RD_ATOMIC | RNR_TIMER), PKEY | of(QKEY, ALT | ACCESS, ALT | ACCESS))
        }
        (Rtr, Rts) => (
            SQ_PSN | of(0, 0, TIMEOUT | RETRY | RNR_RETRY | RD_ATOMIC),
            CUR | of(QKEY, ALT | ACCESS | MIGRATION, ALT | ACCESS | MIGRATION | RNR_TIMER),
        ),
        (Rts, Rts) | (Sqd, Rts) => {
            (0, CUR | of(QKEY, ALT | ACCESS | MIGRATION, ALT | ACCESS | MIGRATION | RNR_TIMER))
        }
        (Rts, Sqd) => (0, SQD_EVENT),
        (Sqd, Sqd) => (
            0,
            PKEY | of(
                QKEY,
                AV | ALT | ACCESS | MIGRATION,
                PORT_NUM
                    | AV
                    | TIMEOUT
                    | RETRY
                    | RNR_RETRY
                    | RD_ATOMIC
                    | DEST_RD_ATOMIC
                    | ALT
                    | ACCESS
                    | RNR_TIMER
                    | MIGRATION,
            ),
        ),
        (Sqe, Rts) if !rc => (0, CUR | of(QKEY, ACCESS, 0)),
        _ => return None,
    })
}

fn state_from_c(state: ibv_qp_state) -> Option<State> {
    Some(match state {
        ibv_qp_state::IBV_QPS_RESET => State::Reset,
        ibv_qp_state::IBV_QPS_INIT => State::Init,
        ibv_qp_state::IBV_QPS_RTR => State::Rtr,
        ibv_qp_state::IBV_QPS_RTS => State::Rts,
        ibv_qp_state::IBV_QPS_SQD => State::Sqd,
        ibv_qp_state::IBV_QPS_SQE => State::Sqe,
        ibv_qp_state::IBV_QPS_ERR => State::Err,
        _ => return None,
    })
}

pub(crate) unsafe extern "C" fn modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let data = unsafe { qp::data(qp) };
    // SAFETY: and valid attributes.
    let new = unsafe { &*attr };
    match change(data, new, mask.cast_unsigned()) {
        Ok(to) => {
            // SAFETY: the structure is live; the field is the program's to read only.
            unsafe { (*qp).state = qp::state_to_c(to) };
            0
        }
        Err(errno) => errno,
    }
}

fn change(data: &qp::QpData, new: &ibv_qp_attr, mask: u32) -> Result<State, c_int> {
    let transport = data.qp.transport;
    let mut attr = data.attr();
    let from = data.qp.lock().machine.state();
    if mask & CUR != 0 && state_from_c(new.cur_qp_state) != Some(from) {
        return Err(libc::EINVAL);
    }
    let to = if mask & STATE != 0 { state_from_c(new.qp_state).ok_or(libc::EINVAL)? } else { from };
    let (required, optional) = attributes_of(transport, from, to).ok_or(libc::EINVAL)?;
    if mask & required != required || mask & !(required | optional | STATE) != 0 {
        return Err(libc::EINVAL);
    }
    let mut merged = merge(&attr, new, mask);
    // It is asked for with each transition to SQD anew.
    if from != State::Sqd && mask & SQD_EVENT == 0 {
        merged.en_sqd_async_notify = 0;
    }
    check(data, &merged, mask)?;
    let peer = match mask & AV {
        0 => None,
        _ => Some(peer(data, &merged)?),
    };
    let attributes = to_proto(data, &merged, transport);
    data.device.modify_queue_pair(&data.qp, to, &attributes, peer).map_err(|_| libc::EINVAL)?;
    *attr =
        if to == State::Reset { ibv_qp_attr { cap: attr.cap, ..super::object::zeroed() } } else { merged };
    Ok(to)
}

fn peer(data: &qp::QpData, attr: &ibv_qp_attr) -> Result<(IpAddr, u8), c_int> {
    let gid = ah::check(&data.device, &attr.ah_attr)?;
    Ok((address_of_gid(gid), attr.ah_attr.grh.traffic_class))
}

/// The attributes as they are with the named ones changed.
fn merge(old: &ibv_qp_attr, new: &ibv_qp_attr, mask: u32) -> ibv_qp_attr {
    let mut merged = *old;
    macro_rules! take {
        ($($flag:ident: $($field:ident)*;)*) => {
            $(if mask & $flag != 0 { $(merged.$field = new.$field;)* })*
        };
    }
    take! {
        SQD_EVENT: en_sqd_async_notify;
        ACCESS: qp_access_flags;
        PKEY: pkey_index;
        PORT_NUM: port_num;
        QKEY: qkey;
        AV: ah_attr;
        MTU: path_mtu;
        TIMEOUT: timeout;
        RETRY: retry_cnt;
        RNR_RETRY: rnr_retry;
        RQ_PSN: rq_psn;
        RD_ATOMIC: max_rd_atomic;
        ALT: alt_ah_attr alt_pkey_index alt_port_num alt_timeout;
        RNR_TIMER: min_rnr_timer;
        SQ_PSN: sq_psn;
        DEST_RD_ATOMIC: max_dest_rd_atomic;
        MIGRATION: path_mig_state;
        DEST: dest_qp_num;
    }
    merged
}

/// Checks the values that are named.
fn check(data: &qp::QpData, attr: &ibv_qp_attr, mask: u32) -> Result<(), c_int> {
    let active = data.device.active_mtu;
    let wrong = [
        (PKEY, attr.pkey_index != 0),
        (PORT_NUM, attr.port_num != PORT),
        (MTU, PathMtu::from_verbs(attr.path_mtu.0).is_none_or(|mtu| mtu > active)),
        (TIMEOUT, attr.timeout > 31),
        (RETRY, attr.retry_cnt > 7),
        (RNR_RETRY, attr.rnr_retry > 7),
        (RNR_TIMER, attr.min_rnr_timer > 31),
        (RD_ATOMIC, attr.max_rd_atomic > MAX_RD_ATOMIC),
        (DEST_RD_ATOMIC, attr.max_dest_rd_atomic > MAX_RD_ATOMIC),
        (ALT, attr.alt_port_num != PORT || attr.alt_timeout > 31),
        (DEST, attr.dest_qp_num > 0xff_ffff),
    ];
    if wrong.iter().any(|(flag, wrong)| mask & flag != 0 && *wrong) { Err(libc::EINVAL) } else { Ok(()) }
}

fn to_proto(data: &qp::QpData, attr: &ibv_qp_attr, transport: Transport) -> Attributes {
    let flag = |flag: ibv_access_flags, access| {
        if attr.qp_access_flags & flag.0 != 0 { access } else { QpAccess::empty() }
    };
    let access = flag(ibv_access_flags::IBV_ACCESS_REMOTE_WRITE, QpAccess::REMOTE_WRITE)
        | flag(ibv_access_flags::IBV_ACCESS_REMOTE_READ, QpAccess::REMOTE_READ)
        | flag(ibv_access_flags::IBV_ACCESS_REMOTE_ATOMIC, QpAccess::REMOTE_ATOMIC);
    // A datagram is one packet of the port's MTU at most; a connection says its own.
    let path_mtu = match transport {
        Transport::Rc | Transport::Uc => PathMtu::from_verbs(attr.path_mtu.0),
        _ => None,
    };
    Attributes {
        pkey: DEFAULT_PKEY,
        qkey: attr.qkey,
        access,
        path_mtu: path_mtu.unwrap_or(data.device.active_mtu),
        dest_qp: attr.dest_qp_num,
        receive_psn: Psn::new(attr.rq_psn),
        max_dest_rd_atomic: attr.max_dest_rd_atomic,
        min_rnr_timer: RnrTimer::new(attr.min_rnr_timer),
        send_psn: Psn::new(attr.sq_psn),
        max_rd_atomic: attr.max_rd_atomic,
        timeout: attr.timeout,
        retry_count: attr.retry_cnt,
        rnr_retry: attr.rnr_retry,
        sqd_event: attr.en_sqd_async_notify != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transitions_are_those_of_the_specification() {
        use State::*;
        let all = [Reset, Init, Rtr, Rts, Sqd, Sqe, Err];
        let count = |transport| {
            all.iter()
                .flat_map(|from| all.map(|to| (*from, to)))
                .filter(|(from, to)| attributes_of(transport, *from, *to).is_some())
                .count()
        };
        // Two from everywhere, and: RESET-INIT, INIT-INIT, INIT-RTR, RTR-RTS, RTS-RTS, SQD-RTS, RTS-SQD,
        // SQD-SQD; SQE-RTS where there is an SQE.
        assert_eq!(count(Transport::Rc), 14 + 8);
        assert_eq!(count(Transport::Uc), 14 + 9);
        assert_eq!(count(Transport::Ud), 14 + 9);
    }

    #[test]
    fn a_reliable_connection_needs_all_of_its_path() {
        let (required, _) = attributes_of(Transport::Rc, State::Init, State::Rtr).unwrap();
        assert_eq!(required, AV | MTU | DEST | RQ_PSN | DEST_RD_ATOMIC | RNR_TIMER);
        assert_eq!(attributes_of(Transport::Ud, State::Init, State::Rtr).unwrap().0, 0);
    }
}
