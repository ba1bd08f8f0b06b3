//! Object storage behind one handle: URLs, retries that are counted and reported, request limits
