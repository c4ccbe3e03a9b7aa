// SPDX-License-Identifier: GPL-2.0
/*
 * What programs learn of a migration: a uevent of the device, and the same in
 * its folder in sysfs for those that start later.
 */

#include <linux/device.h>
#include <linux/mutex.h>
#include <linux/sysfs.h>

#include "helpers.h"

/* A guest has one device, so there is one last migration. */
static struct vsock_glue_migration last;
static DEFINE_MUTEX(last_lock);

static const char *cause_name(u32 cause)
{
	switch (cause) {
	case VSOCK_GLUE_TRANSPORT_RESET:
		return "transport-reset";
	case VSOCK_GLUE_CID_UPDATE:
		return "cid-update";
	default:
		return "none";
	}
}

/* Sleeps. */
void vsock_glue_show_migration(const struct vsock_glue_migration *migration)
{
	mutex_lock(&last_lock);
	last = *migration;
	mutex_unlock(&last_lock);
}

/* Sleeps. The device stays for as long as it is being announced. */
void vsock_glue_announce(struct virtio_device *vdev,
			 const struct vsock_glue_migration *migration)
{
	struct kobj_uevent_env *env = kzalloc(sizeof(*env), GFP_KERNEL);

	vsock_glue_show_migration(migration);
	/* Without memory for it sysfs still tells. */
	if (!env)
		return;
	if (!add_uevent_var(env, "VSOCK_CAUSE=%s", cause_name(migration->cause)) &&
	    !add_uevent_var(env, "VSOCK_GENERATION=%llu", migration->generation) &&
	    !add_uevent_var(env, "VSOCK_OLD_CID=%u", migration->old_cid) &&
	    !add_uevent_var(env, "VSOCK_NEW_CID=%u", migration->new_cid) &&
	    !add_uevent_var(env, "VSOCK_CONNECTIONS_RESET=%u", migration->reset) &&
	    !add_uevent_var(env, "VSOCK_CONNECTIONS_KEPT=%u", migration->kept))
		kobject_uevent_env(&vdev->dev.kobj, KOBJ_CHANGE, env->envp);
	kfree(env);
}

static struct vsock_glue_migration last_migration(void)
{
	struct vsock_glue_migration copy;

	mutex_lock(&last_lock);
	copy = last;
	mutex_unlock(&last_lock);
	return copy;
}

static ssize_t cause_show(struct device *dev, struct device_attribute *attr,
			  char *buf)
{
	return sysfs_emit(buf, "%s\n", cause_name(last_migration().cause));
}
static DEVICE_ATTR_RO(cause);

static ssize_t generation_show(struct device *dev,
			       struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", last_migration().generation);
}
static DEVICE_ATTR_RO(generation);

static ssize_t old_cid_show(struct device *dev, struct device_attribute *attr,
			    char *buf)
{
	return sysfs_emit(buf, "%u\n", last_migration().old_cid);
}
static DEVICE_ATTR_RO(old_cid);

static ssize_t new_cid_show(struct device *dev, struct device_attribute *attr,
			    char *buf)
{
	return sysfs_emit(buf, "%u\n", last_migration().new_cid);
}
static DEVICE_ATTR_RO(new_cid);

static ssize_t connections_reset_show(struct device *dev,
				      struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", last_migration().reset);
}
static DEVICE_ATTR_RO(connections_reset);

static ssize_t connections_kept_show(struct device *dev,
				     struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", last_migration().kept);
}
static DEVICE_ATTR_RO(connections_kept);

static struct attribute *migration_attributes[] = {
	&dev_attr_cause.attr,
	&dev_attr_generation.attr,
	&dev_attr_old_cid.attr,
	&dev_attr_new_cid.attr,
	&dev_attr_connections_reset.attr,
	&dev_attr_connections_kept.attr,
	NULL,
};

static const struct attribute_group migration_group = {
	.name = "migration",
	.attrs = migration_attributes,
};

static const struct attribute_group *groups[] = {
	&migration_group,
	NULL,
};

void vsock_glue_set_groups(struct virtio_driver *driver)
{
	driver->driver.dev_groups = groups;
}
