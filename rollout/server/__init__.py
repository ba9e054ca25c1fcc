"""The engine over ZMQ: sockets, sessions of clients, and the threads that speak to the engine for them."""
