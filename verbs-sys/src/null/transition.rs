//! Which attributes each transition of a queue pair needs and allows (IBTA volume 1, 11.2.4.2,
//! table 91), as the kernel checks them.

use crate::bindings::*;

use ibv_qp_attr_mask as Mask;
use ibv_qp_state as State;

const PATH_OPTIONS: Mask = Mask(Mask::IBV_QP_ALT_PATH.0 | Mask::IBV_QP_ACCESS_FLAGS.0);

/// Required and optional attributes of `from -> to`, besides `IBV_QP_STATE`; `None` where there is no such transition.
fn attributes(qp_type: ibv_qp_type, from: State, to: State) -> Option<(Mask, Mask)> {
    let ud = qp_type == ibv_qp_type::IBV_QPT_UD;
    let rc = qp_type == ibv_qp_type::IBV_QPT_RC;
    let only_rc = |mask: Mask| if rc { mask } else { Mask(0) };
    let none = Mask(0);
    let identity = Mask::IBV_QP_PKEY_INDEX
        | Mask::IBV_QP_PORT
        | if ud { Mask::IBV_QP_QKEY } else { Mask::IBV_QP_ACCESS_FLAGS };
    let while_sending = Mask::IBV_QP_CUR_STATE
        | if ud {
            Mask::IBV_QP_QKEY
        } else {
            PATH_OPTIONS | Mask::IBV_QP_PATH_MIG_STATE | only_rc(Mask::IBV_QP_MIN_RNR_TIMER)
        };
    Some(match (from, to) {
        (_, State::IBV_QPS_RESET | State::IBV_QPS_ERR) => (none, none),
        (State::IBV_QPS_RESET, State::IBV_QPS_INIT) => (identity, none),
        (State::IBV_QPS_INIT, State::IBV_QPS_INIT) => (none, identity),
        (State::IBV_QPS_INIT, State::IBV_QPS_RTR) if ud => {
            (none, Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_QKEY)
        }
        (State::IBV_QPS_INIT, State::IBV_QPS_RTR) => (
            Mask::IBV_QP_AV
                | Mask::IBV_QP_PATH_MTU
                | Mask::IBV_QP_DEST_QPN
                | Mask::IBV_QP_RQ_PSN
                | only_rc(Mask::IBV_QP_MAX_DEST_RD_ATOMIC | Mask::IBV_QP_MIN_RNR_TIMER),
            PATH_OPTIONS | Mask::IBV_QP_PKEY_INDEX,
        ),
        (State::IBV_QPS_RTR, State::IBV_QPS_RTS) => (
            Mask::IBV_QP_SQ_PSN
                | only_rc(
                    Mask::IBV_QP_TIMEOUT
                        | Mask::IBV_QP_RETRY_CNT
                        | Mask::IBV_QP_RNR_RETRY
                        | Mask::IBV_QP_MAX_QP_RD_ATOMIC,
                ),
            while_sending,
        ),
        (State::IBV_QPS_RTS | State::IBV_QPS_SQD, State::IBV_QPS_RTS) => (none, while_sending),
        (State::IBV_QPS_SQE, State::IBV_QPS_RTS) if !rc => (none, while_sending),
        (State::IBV_QPS_RTS, State::IBV_QPS_SQD) => (none, Mask::IBV_QP_EN_SQD_ASYNC_NOTIFY),
        (State::IBV_QPS_SQD, State::IBV_QPS_SQD) if ud => (none, Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_QKEY),
        (State::IBV_QPS_SQD, State::IBV_QPS_SQD) => (
            none,
            PATH_OPTIONS
                | Mask::IBV_QP_AV
                | Mask::IBV_QP_PKEY_INDEX
                | Mask::IBV_QP_PATH_MIG_STATE
                | only_rc(
                    Mask::IBV_QP_PORT
                        | Mask::IBV_QP_TIMEOUT
                        | Mask::IBV_QP_RETRY_CNT
                        | Mask::IBV_QP_RNR_RETRY
                        | Mask::IBV_QP_MAX_QP_RD_ATOMIC
                        | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
                        | Mask::IBV_QP_MIN_RNR_TIMER,
                ),
        ),
        _ => return None,
    })
}

/// Whether `mask` has all that the transition needs and nothing that it does not know.
pub(crate) fn is_allowed(qp_type: ibv_qp_type, from: State, to: State, mask: Mask) -> bool {
    attributes(qp_type, from, to).is_some_and(|(required, optional)| {
        let known = required | optional | Mask::IBV_QP_STATE;
        mask.0 & required.0 == required.0 && mask.0 & !known.0 == 0
    })
}
