//! Plan, start and supervise one worker per device
