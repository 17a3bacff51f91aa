"""What crosses the wire: tasks, replies, schemas of flat vectors, and how they are packed."""
