//! Communicator (NCCL, Gloo, local) and the rendezvous store
