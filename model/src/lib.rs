//! FLOWER: Florence-2 encoder and rectified-flow transformer in Burn, without a backend
