"use strict";
// Every few seconds: what is marked as live is replaced by what the server says now, where it
// differs. Forms are left alone; if what they act upon has changed, a notice says so. What was
// unfolded stays so, and who was at a link stays at it.
const show = (id, on) => { document.getElementById(id).hidden = !on; };

function replace(old, now) {
  const folds = [...old.querySelectorAll("details")].map((fold) => fold.open);
  now.querySelectorAll("details").forEach((fold, n) => { fold.open = folds[n] ?? false; });
  if (old.isEqualNode(now)) return;
  const places = "a, button, summary, [tabindex]";
  const at = [...old.querySelectorAll(places)].indexOf(document.activeElement);
  const scrolled = [...old.querySelectorAll(".scroll")].map((box) => box.scrollTop);
  old.replaceWith(document.adoptNode(now));
  now.querySelectorAll(".scroll").forEach((box, n) => { box.scrollTop = scrolled[n] ?? 0; });
  if (at >= 0) now.querySelectorAll(places)[at]?.focus({ preventScroll: true });
}

async function look() {
  if (document.hidden) return;
  const answer = await fetch(location.href, { headers: { "X-Live": "1" }, cache: "no-store" });
  if (answer.status === 401) return location.reload();
  if (answer.status >= 500) throw new Error(answer.status);
  show("lost", false);
  if (!answer.ok) return show("changed", true);  // what the page is about is no longer there
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const old of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(old.id);
    if (now) replace(old, now);
  }
  show("changed", fresh.body.dataset.state !== document.body.dataset.state);
}

setInterval(() => look().catch(() => show("lost", true)), 5000);
