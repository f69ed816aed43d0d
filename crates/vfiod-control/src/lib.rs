//! Requests and answers of the control socket, as types.
