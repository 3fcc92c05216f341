//! The environment variables that configure the device.

use crate::net::{ADDRESS_VARIABLE, FAULT_VARIABLE, FaultRates, OpenError, PCAP_VARIABLE};

/// What the variables say, read once when the device is opened.
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    /// `RDMA_SOFT_ADDR`: an address or an interface.
    pub(crate) address: Option<String>,
    /// `RDMA_SOFT_GSO=off`: every datagram by its own call.
    pub(crate) no_segmentation: bool,
    /// `RDMA_SOFT_LOCAL=wire`: packets between queue pairs of this process through the socket too.
    pub(crate) local_through_wire: bool,
    /// `RDMA_SOFT_PCAP`: where to write all packets.
    pub(crate) capture: Option<String>,
    /// `RDMA_SOFT_FAULT`: what to do to packets.
    pub(crate) fault: Option<FaultRates>,
}

impl Settings {
    pub(crate) fn from_environment() -> Result<Settings, OpenError> {
        Settings::from_variables(|name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))
    }

    fn from_variables(variable: impl Fn(&'static str) -> Option<String>) -> Result<Settings, OpenError> {
        let set = |name| variable(name).filter(|v: &String| !v.trim().is_empty());
        Ok(Settings {
            address: set(ADDRESS_VARIABLE),
            no_segmentation: switch("RDMA_SOFT_GSO", set("RDMA_SOFT_GSO"), "off", "on")?,
            local_through_wire: switch("RDMA_SOFT_LOCAL", set("RDMA_SOFT_LOCAL"), "wire", "memory")?,
            capture: set(PCAP_VARIABLE),
            fault: match set(FAULT_VARIABLE) {
                Some(value) => Some(value.parse().map_err(|reason| OpenError::BadSetting {
                    variable: FAULT_VARIABLE,
                    value: value.clone(),
                    reason,
                })?),
                None => None,
            },
        })
    }
}

/// Whether the variable has the value `yes`; unset is `no`.
fn switch(variable: &'static str, value: Option<String>, yes: &str, no: &str) -> Result<bool, OpenError> {
    match value {
        None => Ok(false),
        Some(value) if value == no => Ok(false),
        Some(value) if value == yes => Ok(true),
        Some(value) => {
            Err(OpenError::BadSetting { variable, value, reason: format!("it is either {yes:?} or {no:?}") })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &'static str, value: &str) -> Result<Settings, OpenError> {
        Settings::from_variables(|n| (n == name).then(|| value.to_owned()))
    }

    #[test]
    fn nothing_set_is_the_default() {
        let settings = Settings::from_variables(|_| None).unwrap();
        assert!(!settings.no_segmentation && !settings.local_through_wire && settings.fault.is_none());
    }

    #[test]
    fn each_variable_is_understood_or_refused_in_words() {
        assert!(with("RDMA_SOFT_GSO", "off").unwrap().no_segmentation);
        assert!(with("RDMA_SOFT_LOCAL", "wire").unwrap().local_through_wire);
        let error = with("RDMA_SOFT_GSO", "maybe").unwrap_err().to_string();
        assert!(error.contains("RDMA_SOFT_GSO=maybe") && error.contains("off"), "{error}");
        let error = with(FAULT_VARIABLE, "loss=2").unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        assert!(error.to_string().contains("loss"), "{error}");
    }
}
