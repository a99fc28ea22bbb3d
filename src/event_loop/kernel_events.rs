//! Reads what the TC program reports of single datagrams, and passes it to the drop log and to traces.

use super::Daemon;

impl Daemon {
    pub(super) fn read_kernel_events(&mut self) {
        let Some(kernel) = &mut self.kernel else { return };
        match kernel.events().drain() {
            Ok(events) => {
                for event in events {
                    let listener = self.controller.listener_name(event.listener).unwrap_or_default();
                    self.drop_log.log(&event, listener);
                    if event.traced {
                        self.send_to_traces(&event);
                    }
                }
                // A client may have gone meanwhile.
                self.update_trace_filter();
            }
            Err(error) => tracing::error!("{error:#}"),
        }
    }
}
