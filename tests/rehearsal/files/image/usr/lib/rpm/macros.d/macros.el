%_dbpath /usr/lib/sysimage/rpm
