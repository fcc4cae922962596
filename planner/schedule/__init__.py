"""Pipeline schedules: orders per device, the engine that prices them, and what they keep in memory."""
