"""The slots of a cluster as processes: Ray actors, their hosts, their sockets."""
