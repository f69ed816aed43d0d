//! A client's memory as a device reaches it: mapped files, copies, and the IOVA map.
