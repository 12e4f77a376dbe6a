"""What a device, a link and a framework can do, as measured."""
