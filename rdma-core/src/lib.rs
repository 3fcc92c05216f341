//! Safe RDMA verbs with the queue-pair state machine in the type system
