//! Where a device does something else than the specification says, in one place: a test asks for a behaviour, never for a
//! device's name. `docs/INTEROP.md` shows each.

use rdma_core::{Context, Device, Provider};

/// Something that the device under test does differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Difference {
    /// A datagram posted with the high bit of the Q_Key set carries that key, not the sender's own (IBTA volume 1, 10.2.5).
    QKeyAsPosted,
    /// A receive that is posted to a pair in the error state is flushed only when ERR is commanded again (IBTA volume 1, 10.3.1.7).
    LateReceivesStay,
    /// A send begins some time after its post, so that SQD may hold it until RTS, which the specification permits (10.3.1.5).
    SendsBeginLater,
    /// A request that fails on its own side completes as flushed, and a UD pair fails instead of its send queue alone.
    LocalErrorsAreFlushes,
    /// The completion of a receive does not name the key that came to be invalidated.
    InvalidatedKeyUnnamed,
    /// A pair that joined a multicast group hears the own device only after the interface has joined the group as well.
    GroupsNeedTheInterface,
    /// A multicast group of IPv4 is known by its mapped address only, not as ff0e::ffff:239.1.2.3.
    MappedGroupsOnly,
    /// Queue pairs of a process that is stopped acknowledge and answer all the same.
    AnswersForStoppedProcesses,
}

impl Difference {
    fn applies(self, context: &Context) -> bool {
        // Network cards answer by themselves, too.
        let built_in = Device::named(context.name()).is_ok_and(|device| device.provider() == Provider::Soft);
        // No manufacturer has the number that rxe gives itself.
        let rxe = !built_in && context.attributes().is_ok_and(|attributes| attributes.vendor_id == 0xff_ffff);
        match self {
            Difference::AnswersForStoppedProcesses => !built_in,
            _ => rxe,
        }
    }
}

/// Whether the device behaves as `difference` says; where it does, a line tells CI that the test expected it.
pub(crate) fn differs(context: &Context, difference: Difference) -> bool {
    let applies = difference.applies(context);
    if applies {
        println!("DIFFERS {difference:?}");
    }
    applies
}

/// Says that a test, or a part of it, does not apply to the device: the line is what CI counts.
pub(crate) fn skip(what: &str, why: impl std::fmt::Display) {
    println!("SKIPPED {what}: {why}");
}
