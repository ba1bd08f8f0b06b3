//! Sharded safetensors checkpoints with an append-only commit log, for any world size
