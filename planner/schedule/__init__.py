"""Pipeline schedules: orders per device, the longest-path engine that prices them, and what they keep in memory."""
