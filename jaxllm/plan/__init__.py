"""Sizing a run before a device is rented: memory, time and traffic from the compiled programs."""
