//! What the programs of `tests/`, `benches/`, `testkit/` and `fuzz/` use of this crate, under the paths that it has here.
//!
//! All else is private to the crate: the compiler warns of what the program does not use. Add an item here when a test
//! needs it, and remove it with the last test that does.

pub mod admission {
    pub use crate::admission::{Meter, Prefix, SourceRules, TICKS_PER_SECOND};
}

pub mod config {
    pub use crate::config::{
        Config, DownstreamSource, HandoverConfig, Interfaces, ListenerConfig, ListenerIdAllocator, MapLimits,
        MetricsConfig, OnExit, RequestedMode, STATUS_SOCKET, TcxOrder, UserspaceSettings,
    };

    pub mod keys {
        pub use crate::config::keys::{KeyKind, KeySpec, WhenAbsent, json_schema, walk};
    }
}

pub mod control {
    pub mod protocol {
        pub use crate::control::protocol::{ResponseHead, StatusReply, StatusRequest, TraceLine};
    }

    pub mod rates {
        pub use crate::control::rates::add;
    }

    pub mod report {
        pub use crate::control::report::StatusReport;
    }

    pub mod server {
        pub use crate::control::server::{StatusServer, TOKENS};
    }

    pub mod tables {
        pub use crate::control::tables::render;
    }

    pub mod trace {
        pub use crate::control::trace::TraceSubscription;
    }
}

pub mod controller {
    pub use crate::controller::{Controller, ControllerAction, ControllerEvent, DownstreamOrigin, RETRY};
}

pub mod datapath {
    pub use crate::datapath::{Datapath, DatapathCounters};

    pub mod kernel {
        pub use crate::datapath::kernel::{KernelDatapath, KernelSetup};

        pub mod attach {
            pub use crate::datapath::kernel::attach::{AttachMode, Attachment};
        }

        pub mod counters {
            pub use crate::datapath::kernel::counters::fragments;
        }

        pub mod events {
            pub use crate::datapath::kernel::events::{DatagramEvent, DatagramOutcome, DeliveryPath, TraceFilter};
        }

        pub mod skel {
            pub use crate::datapath::kernel::skel::verifier_statistics;

            pub mod types {
                pub use crate::datapath::kernel::skel::types::__sk_buff;
            }
        }
    }

    pub mod user {
        pub use crate::datapath::user::{UserDatapath, udp_header};
    }
}

pub mod discovery {
    pub use crate::discovery::{
        Discovery, DiscoveryRequest, DiscoverySettings, DiscoveryTimeouts, DiscoveryUpdate, ErrorKind, Locality,
        PortRef, ServiceRef, ServiceStatus, Terminating,
    };

    pub mod aggregator {
        pub use crate::discovery::aggregator::{Aggregator, WatchEvent};
    }

    pub mod service_key {
        pub use crate::discovery::service_key::ServiceKey;
    }

    pub mod slices {
        pub use crate::discovery::slices::{
            AddressType, EndpointReadiness, EndpointRules, EndpointSelection, NodeLocation, ServiceSlices, Slice,
            select_endpoints,
        };
    }

    pub mod wire {
        pub use crate::discovery::wire::{ApiSlice, BetaEndpointSlice};
    }
}

pub mod health {
    pub use crate::health::{HealthChecks, ListenerCheck};

    pub mod model {
        pub use crate::health::model::{HealthState, ProbeOutcome, TargetStatus};
    }

    pub mod probe_stats {
        pub use crate::health::probe_stats::{ProbeStats, ProbeStatsByKind};
    }

    pub mod probers {
        pub mod http {
            pub use crate::health::probers::http::{MAX_HEAD, parse_response};
        }

        pub mod icmp {
            pub use crate::health::probers::icmp::{EchoMessage, IcmpSocketKind, open, without_ip_header};
        }
    }

    pub mod settings {
        pub use crate::health::settings::{HealthSettings, ProbeBytes, ProbeKind, ProbeProtocol, ProbeSettings};
    }

    pub mod weights {
        pub use crate::health::weights::{HealthMap, HealthMark};
    }
}

pub mod host {
    pub use crate::host::{
        HostAddress, HostFacts, HostFeatures, HostMonitor, HostNetwork, Link, Neighbour, NextHopTracking, Route,
        TcUnsupported, tc_ebpf_support,
    };

    pub mod decode {
        pub use crate::host::decode::datagram;
    }

    pub mod programs {
        pub use crate::host::programs::{Hook, has_tcx, list, name};
    }
}

pub mod metrics {
    pub use crate::metrics::{DownstreamSnapshot, ListenerSnapshot, MetricsSnapshot, PlanApplyCounts, ReloadCounts};

    pub mod http {
        pub use crate::metrics::http::{
            HttpLimits, ListenerReadiness, ListenerServing, MainLoopRequest, MetricsListener, MetricsServer,
            ReadinessReport, ReadinessState, ServingReport,
        };
    }

    pub mod names {
        pub use crate::metrics::names::{ALL, HEALTH_PROBES, LISTENER_MODE, Metric, MetricKind, PACKETS_DROPPED};
    }
}

pub mod model {
    pub use crate::model::{
        Downstream, DownstreamCounters, DownstreamSet, DropReason, Drops, FragmentCounters, HashOn, ListenerCounters,
        ListenerId, Mode, Policy,
    };
}

pub mod net {
    pub use crate::net::Family;
}

pub mod plan {
    pub use crate::plan::{Delivery, LinkRef, ListenerPlan, MacPair, Plan, PlanTarget};

    pub mod compile {
        pub use crate::plan::compile::compile;
    }

    pub mod hash {
        pub use crate::plan::hash::{flow_hash, message_hash, table_slot};
    }

    pub mod maglev {
        pub use crate::plan::maglev::table;
    }

    pub mod round_robin {
        pub use crate::plan::round_robin::interleave;
    }
}
