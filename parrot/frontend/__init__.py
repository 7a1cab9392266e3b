"""What runs in a client's process: `pfunc`, and the HTTP client under it. It knows the protocol and no server code."""
