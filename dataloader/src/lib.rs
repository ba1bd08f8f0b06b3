//! Streams multi-embodiment robot episodes from Parquet row groups in object storage
