"""Jobs that write one store, stopped and woken between any two operations of its storage."""
